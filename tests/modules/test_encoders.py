"""Session encoders against plain dense versions of the papers' equations, session by session and click by click."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph
from llmgr_rec.errors import UserError
from llmgr_rec.kernels.shared_states import SharedStates
from llmgr_rec.modules.encoders import build_encoder
from llmgr_rec.modules.gated_graph import GatedGraph
from llmgr_rec.modules.gcsan import ATTENTION_WEIGHT, GCSAN, AttentionBlock
from llmgr_rec.modules.session_encoder import SessionEncoder, segment_softmax
from llmgr_rec.modules.srgnn import SRGNN
from tests.modules.graphs import NUM_ITEMS, graphs_of, sessions_strategy

DIM = 8
SESSIONS = [[1, 2, 3, 2, 4], [5], [], [3, 3, 1, 3, 3], [0, 7, 0, 7, 0, 8]]
VARIANTS = [
    EncoderConfig(name="gcsan", dropout=0.0),
    EncoderConfig(name="gcsan", dropout=0.0, steps=2, attention_layers=3, attention_heads=2),
    EncoderConfig(name="srgnn", dropout=0.0),
    EncoderConfig(name="srgnn", dropout=0.0, steps=3),
]


def double_encoder(config: EncoderConfig) -> SessionEncoder:
    torch.manual_seed(0)
    return build_encoder(config, DIM).double()


def node_vectors(graph: SessionGraph) -> Tensor:
    """A vector for each node that depends on its item alone."""
    table = torch.randn(64, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return table[graph.node_items_N]


def dense_gated_graph(network: GatedGraph, nodes: Tensor, session: list[int]) -> Tensor:
    """SR-GNN's eq. 1 to 5 for one session, with the connection matrix of the paper's figure 2."""
    items = list(dict.fromkeys(session))
    follows = torch.zeros(len(items), len(items), dtype=nodes.dtype)
    for before, after in itertools.pairwise(session):
        follows[items.index(before), items.index(after)] = 1
    outgoing = follows / follows.sum(1, keepdim=True).clamp(min=1)
    incoming = follows.T / follows.T.sum(1, keepdim=True).clamp(min=1)
    weight_z_r_o = network.update.weight_ih.chunk(3), network.update.weight_hh.chunk(3)
    bias_z_r_o = network.update.bias_ih.chunk(3), network.update.bias_hh.chunk(3)
    (w_r, w_z, w_o), (u_r, u_z, u_o) = weight_z_r_o
    (b_r, b_z, b_o), (c_r, c_z, c_o) = bias_z_r_o
    for _ in range(network.steps):
        messages = [incoming @ nodes @ network.message[0].T, outgoing @ nodes @ network.message[1].T]
        a = torch.cat(messages, dim=1) + network.message_bias
        z = torch.sigmoid(a @ w_z.T + b_z + nodes @ u_z.T + c_z)
        r = torch.sigmoid(a @ w_r.T + b_r + nodes @ u_r.T + c_r)
        candidate = torch.tanh(a @ w_o.T + b_o + r * (nodes @ u_o.T + c_o))
        nodes = z * nodes + (1 - z) * candidate
    return nodes


def dense_srgnn(encoder: SRGNN, states_LD: Tensor) -> Tensor:
    """SR-GNN's eq. 6 and 7 for one session, over its clicks."""
    last = states_LD[-1]
    hidden = torch.sigmoid(encoder.attend_last(last) + encoder.attend_node(states_LD))
    alpha = encoder.attend_score(hidden)
    return encoder.read_out(torch.cat([last, (alpha * states_LD).sum(0)]))


def dense_gcsan(encoder: GCSAN, states_LD: Tensor) -> Tensor:
    """GC-SAN's attention blocks for one session, over its clicks, head by head."""
    hidden = states_LD
    for block in encoder.blocks:
        heads = []
        for q, k, v in zip(*(p.weight.chunk(block.heads) for p in (block.query, block.key, block.value)), strict=True):
            weights = torch.softmax((hidden @ q.T) @ (hidden @ k.T).T / q.shape[0] ** 0.5, dim=1)
            heads.append(weights @ (hidden @ v.T))
        attended = torch.cat(heads, dim=1)
        hidden = attended + block.contract(torch.relu(block.expand(attended)))
    return ATTENTION_WEIGHT * hidden[-1] + (1 - ATTENTION_WEIGHT) * states_LD[-1]


def encode_one_by_one(encoder: SessionEncoder, nodes_ND: Tensor, graph: SessionGraph, sessions: list[list[int]]):
    """The dense reference of a whole batch."""
    states, vectors = [], []
    for number, session in enumerate(sessions):
        first, end = graph.node_offsets_B1[number : number + 2].tolist()
        dense = dense_gated_graph(encoder.graph_network, nodes_ND[first:end], session)
        states.append(dense)
        items = list(dict.fromkeys(session))
        clicked = dense[[items.index(item) for item in session]]
        dense = dense_srgnn if isinstance(encoder, SRGNN) else dense_gcsan
        vectors.append(dense(encoder, clicked) if session else nodes_ND.new_zeros(DIM))
    return torch.cat(states), torch.stack(vectors)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@given(sessions=sessions_strategy)
@settings(deadline=None, max_examples=25)
def test_agrees_with_the_papers_dense_equations(config: EncoderConfig, sessions: list[list[int]]) -> None:
    encoder = double_encoder(config)
    graph = graphs_of(sessions)
    nodes_ND = node_vectors(graph)
    encoded = encoder(nodes_ND, graph)
    states_ND, sessions_BD = encode_one_by_one(encoder, nodes_ND, graph, sessions)
    torch.testing.assert_close(encoded.states_ND, states_ND, rtol=0, atol=1e-10)
    torch.testing.assert_close(encoded.sessions_BD, sessions_BD, rtol=0, atol=1e-10)


@given(sessions=sessions_strategy)
@settings(deadline=None, max_examples=25)
def test_what_is_computed_for_all_items_gives_the_same_session_vectors(sessions: list[list[int]]) -> None:
    graph = graphs_of(sessions)
    items_VD = torch.randn(NUM_ITEMS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prepared = 0
    for config in VARIANTS:
        encoder = double_encoder(config).eval()
        assert encoder.can_prepare(NUM_ITEMS) == (config.steps == 1)
        assert not encoder.can_prepare(10**9)
        if config.steps == 1:
            with torch.no_grad():
                items = encoder.prepare_items(items_VD)
                nodes_ND = items_VD[graph.node_items_N]
                expected = encoder(nodes_ND, graph).sessions_BD
                torch.testing.assert_close(
                    encoder.encode_prepared(items, nodes_ND, graph), expected, rtol=0, atol=1e-10
                )
            prepared += 1
    assert prepared


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_gradients_agree_with_the_dense_equations(config: EncoderConfig) -> None:
    encoder = double_encoder(config)
    graph = graphs_of(SESSIONS)
    gradients = []
    for fast in (True, False):
        nodes_ND = node_vectors(graph).requires_grad_()
        if fast:
            vectors_BD = encoder(nodes_ND, graph).sessions_BD
        else:
            vectors_BD = encode_one_by_one(encoder, nodes_ND, graph, SESSIONS)[1]
        encoder.zero_grad()
        (vectors_BD * torch.arange(1.0, DIM + 1, dtype=torch.float64)).sin().sum().backward()
        gradients.append({"nodes": nodes_ND.grad} | {name: p.grad for name, p in encoder.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_single_precision_is_close_to_double(config: EncoderConfig) -> None:
    encoder = double_encoder(config)
    graph = graphs_of(SESSIONS)
    nodes_ND = node_vectors(graph)
    expected = encoder(nodes_ND, graph).sessions_BD
    actual = encoder.float()(nodes_ND.float(), graph).sessions_BD
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@given(sessions=sessions_strategy)
@settings(deadline=None, max_examples=15)
def test_a_session_does_not_depend_on_its_neighbors(config: EncoderConfig, sessions: list[list[int]]) -> None:
    encoder = double_encoder(config)

    def vectors(batch: list[list[int]]) -> Tensor:
        graph = graphs_of(batch)
        return encoder(node_vectors(graph), graph).sessions_BD

    alone = torch.cat([vectors([session]) for session in sessions])
    torch.testing.assert_close(vectors(sessions), alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(vectors([*reversed(sessions), [9, 8, 9]])[:-1].flip(0), alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@pytest.mark.parametrize("sessions", [[[], [1, 2], []], [[], []]], ids=["some empty", "all empty"])
def test_empty_sessions_are_zero_and_keep_gradients_finite(config: EncoderConfig, sessions: list[list[int]]) -> None:
    encoder = double_encoder(config)
    graph = graphs_of(sessions)
    nodes_ND = node_vectors(graph).requires_grad_()
    vectors_BD = encoder(nodes_ND, graph).sessions_BD
    filled = torch.tensor([bool(session) for session in sessions])
    assert (vectors_BD[~filled] == 0).all()
    assert (vectors_BD[filled].abs().sum(1) > 0).all()
    vectors_BD.square().sum().backward()
    # A gradient of zero, but never none: data-parallel wrappers wait for every parameter.
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert nodes_ND.grad.isfinite().all()


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_order_and_repetition_matter(config: EncoderConfig) -> None:
    encoder = double_encoder(config)
    graph = graphs_of([[1, 2, 3], [2, 1, 3], [1, 2, 3, 3], [1, 2, 1, 2, 3]])
    vectors_BD = encoder(node_vectors(graph), graph).sessions_BD
    assert torch.pdist(vectors_BD).min() > 1e-4


@pytest.mark.parametrize("name", ["gcsan", "srgnn"])
def test_dropout_acts_in_training_only(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name, dropout=0.5), DIM).double()
    graph = graphs_of(SESSIONS)
    nodes_ND = node_vectors(graph)
    assert not torch.equal(encoder(nodes_ND, graph).sessions_BD, encoder(nodes_ND, graph).sessions_BD)
    encoder.eval()
    assert torch.equal(encoder(nodes_ND, graph).sessions_BD, encoder(nodes_ND, graph).sessions_BD)


@pytest.mark.parametrize("name", ["gcsan", "srgnn"])
def test_initial_values_are_uniform_within_the_papers_bound(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name), 64)
    values = torch.cat([parameter.detach().flatten() for parameter in encoder.parameters()])
    assert values.abs().max() <= 64**-0.5
    assert abs(values.std().item() - 64**-0.5 / 3**0.5) < 2e-3


def test_last_click_form_equals_the_full_form() -> None:
    block = AttentionBlock(DIM, heads=2, dropout=0.0).double()
    sessions = [session for session in SESSIONS if session]
    graph = graphs_of(sessions)
    states_ND = node_vectors(graph)
    log_counts_N = torch.rand(len(states_ND), dtype=torch.float64)
    everything = block(states_ND, log_counts_N, graph)[graph.last_node_B]
    states = SharedStates(states_ND, graph.node_session_N, graph.node_offsets_B1)
    last = block.forward_last(states, states_ND[graph.last_node_B], log_counts_N)
    torch.testing.assert_close(last, everything, rtol=0, atol=1e-12)


def test_segment_softmax_survives_large_scores() -> None:
    scores = torch.tensor([[1e4], [1e4], [-1e4], [5.0]])
    weights = segment_softmax(scores, torch.tensor([0, 0, 0, 2]), 3)
    torch.testing.assert_close(weights, torch.tensor([[0.5], [0.5], [0.0], [1.0]]))


def test_unknown_encoder_names_the_known_ones() -> None:
    config = EncoderConfig()
    config.name = "gru4"
    with pytest.raises(UserError, match=r"encoder\.name is gru4, which is neither .*, did you mean gru4rec\?"):
        build_encoder(config, DIM)


@pytest.mark.parametrize(
    ("config", "words"),
    [(EncoderConfig(attention_heads=3), "divide"), (EncoderConfig(attention_layers=0), "at least 1")],
)
def test_settings_that_do_not_fit_are_user_errors(config: EncoderConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_encoder(config, DIM)
