"""All prefixes of a session encoded in one pass: equal to a pass each, and independent of later clicks."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.graph import SessionGraph, nodes_of_longest
from llmgr_rec.kernels.gated_recurrence import Weights, gru_cell
from llmgr_rec.modules import gated_graph
from llmgr_rec.modules.encoders import ENCODERS, build_encoder
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.session_encoder import SessionEncoder
from llmgr_rec.modules.tasks import SbrTask
from tests.modules.graphs import graphs_of
from tests.modules.small_llmgr import D1, make_llmgr, one_pass_batch
from tests.modules.test_encoders import DIM, double_encoder, node_vectors

VARIANTS = [
    EncoderConfig(name="sasrec", dropout=0.0, attention_layers=2, attention_heads=2),
    EncoderConfig(name="esasrec", dropout=0.0, attention_heads=2),
    EncoderConfig(name="hstu", dropout=0.0, attention_layers=2, attention_heads=2),
    EncoderConfig(name="gru4rec", dropout=0.0),
]
GRAPH_VARIANTS = [
    EncoderConfig(name="gcsan", dropout=0.0, attention_layers=2, attention_heads=2),
    EncoderConfig(name="srgnn", dropout=0.0),
]
all_variants = pytest.mark.parametrize("config", [*VARIANTS, *GRAPH_VARIANTS], ids=str)
Sessions = Sequence[Sequence[int]]
SESSIONS = [[1, 2, 3, 2, 4, 1, 1], [5], [0, 7, 0, 8]]


def prefixes_of(sessions: Sessions, most: int = 50) -> tuple[list[list[int]], Tensor]:
    """All prefixes, and the first of each group of at most so many."""
    prefixes, starts = [], []
    for session in sessions:
        for length in range(1, len(session) + 1):
            if (length - 1) % most == 0:
                starts.append(len(prefixes))
            prefixes.append(list(session[:length]))
    return prefixes, torch.tensor([*starts, len(prefixes)])


def in_one_pass(encoder: SessionEncoder, graph: SessionGraph, pass_offsets_P1: Tensor) -> Tensor:
    nodes_MD = node_vectors(graph)[nodes_of_longest(graph, pass_offsets_P1).values]
    return encoder.encode_one_pass(nodes_MD, graph, pass_offsets_P1)


@all_variants
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(1, 9))
@settings(deadline=None, max_examples=25)
def test_a_pass_gives_what_each_prefix_gives(config: EncoderConfig, sessions: Sessions, most: int) -> None:
    encoder = double_encoder(config).eval()
    prefixes, pass_offsets_P1 = prefixes_of(sessions, most)
    graph = graphs_of(prefixes)
    nodes_ND = node_vectors(graph)
    sessions_BD = in_one_pass(encoder, graph, pass_offsets_P1)
    torch.testing.assert_close(sessions_BD, encoder(nodes_ND, graph).sessions_BD, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_prefixes_of_long_sessions_are_encoded_from_the_window_of_the_longest(config: EncoderConfig) -> None:
    config = EncoderConfig(**{**vars(config), "max_clicks": 3})
    encoder = double_encoder(config)
    prefixes, pass_offsets_P1 = prefixes_of([[1, 2, 3, 2, 4]], most=2)
    graph = graphs_of(prefixes)
    one_pass = in_one_pass(encoder, graph, pass_offsets_P1)
    # The groups end with 2, 4 and 5 clicks.
    windows = graphs_of([[1], [1, 2], [2, 3], [2, 3, 2], [3, 2, 4]])
    torch.testing.assert_close(one_pass, encoder(node_vectors(windows), windows).sessions_BD, rtol=0, atol=1e-12)


@all_variants
def test_a_later_click_changes_no_earlier_vector(config: EncoderConfig) -> None:
    encoder = double_encoder(config)
    found = []
    for sessions in (SESSIONS, [[*SESSIONS[0][:4], 9, 9, 9, 9], *SESSIONS[1:]]):
        prefixes, pass_offsets_P1 = prefixes_of(sessions)
        graph = graphs_of(prefixes)
        found.append(in_one_pass(encoder, graph, pass_offsets_P1))
    torch.testing.assert_close(found[0][:4], found[1][:4], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0][-5:], found[1][-5:], rtol=0, atol=1e-12)
    assert (found[0][4:7] - found[1][4:7]).abs().amax(1).min() > 1e-3


@all_variants
def test_loss_and_gradients_are_those_of_a_pass_each(config: EncoderConfig) -> None:
    recommender: SessionRecommender = make_llmgr(encoder=config).recommender.requires_grad_(True)
    sessions = [[1, 2, 3, 2, 4, 8], [7, 9], [5, 5, 6]]
    batch = one_pass_batch(sessions, longest_nodes=True)
    assert batch.pass_offsets_P1.tolist() == [0, 5, 6, 8]
    found = []
    for one_pass in (True, False):
        recommender.zero_grad()
        loss, _ = SbrTask(recommender, one_pass=one_pass)(batch if one_pass else one_pass_batch(sessions))
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in recommender.named_parameters()}})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in found[0].values())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_a_pass_is_over_the_longest_prefixes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build_encoder(VARIANTS[0], D1)
    prefixes, pass_offsets_P1 = prefixes_of(SESSIONS)
    graph, lengths = graphs_of(prefixes), []
    forward = encoder.norm.forward
    monkeypatch.setattr(encoder.norm, "forward", lambda states_LD: lengths.append(len(states_LD)) or forward(states_LD))
    encoder.encode_one_pass(
        torch.zeros(nodes_of_longest(graph, pass_offsets_P1).values.numel(), D1), graph, pass_offsets_P1
    )
    assert lengths == [7 + 1 + 4]


@pytest.mark.parametrize("config", GRAPH_VARIANTS, ids=str)
def test_a_graph_network_updates_two_nodes_of_each_longer_prefix(
    config: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder(config, D1)
    prefixes, pass_offsets_P1 = prefixes_of([[*range(9)], [4, 4, 4], [1, 2, 1, 2]])
    graph, updated = graphs_of(prefixes), []

    def counted(inputs_RF: Tensor, states_RD: Tensor, weights: Weights, product_dtype: torch.dtype) -> Tensor:
        updated.append(len(states_RD))
        return gru_cell(inputs_RF, states_RD, weights, product_dtype)

    monkeypatch.setattr(gated_graph, "gru_cell", counted)
    encoder.encode_one_pass(
        torch.zeros(nodes_of_longest(graph, pass_offsets_P1).values.numel(), D1), graph, pass_offsets_P1
    )
    assert updated == [(1 + 8 * 2) + 3 + (1 + 3 * 2)]


def test_several_rounds_of_messages_are_not_trained_in_one_pass() -> None:
    problems = {
        name: encoder.one_pass_problem(EncoderConfig(name=name, steps=2)) for name, encoder in sorted(ENCODERS.items())
    }
    assert {name: text for name, text in problems.items() if text} == {
        "gcsan": "with encoder.steps 2 the node states of gcsan depend on later clicks",
        "srgnn": "with encoder.steps 2 the node states of srgnn depend on later clicks",
        "stamp": "encoder stamp does not support it",
    }


def test_passes_that_cannot_be_encoded_are_refused() -> None:
    prefixes, pass_offsets_P1 = prefixes_of(SESSIONS)
    graph = graphs_of(prefixes)
    for config, message in (
        (EncoderConfig(name="sasrec", max_clicks=6), "more than 6 prefixes"),
        (EncoderConfig(name="stamp"), "STAMP cannot encode all prefixes of a session in one pass"),
    ):
        with pytest.raises(ValueError, match=message):
            build_encoder(config, DIM).encode_one_pass(node_vectors(graph).float(), graph, pass_offsets_P1)


def test_causal_encoders_support_one_pass() -> None:
    assert sorted(name for name, encoder in ENCODERS.items() if encoder.supports_one_pass) == [
        "esasrec",
        "gcsan",
        "gru4rec",
        "hstu",
        "sasrec",
        "srgnn",
    ]
