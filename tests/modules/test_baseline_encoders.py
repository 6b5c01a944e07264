"""SASRec, eSASRec, HSTU, GRU4Rec and STAMP against plain versions, session by session and click by click."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional

from llmgr_rec.config import EncoderConfig
from llmgr_rec.errors import UserError
from llmgr_rec.modules.encoders import build_encoder
from llmgr_rec.modules.gru4rec import GRU4Rec
from llmgr_rec.modules.hstu import HSTU
from llmgr_rec.modules.ligr_block import LiGRBlock
from llmgr_rec.modules.sasrec import SASRec
from llmgr_rec.modules.session_encoder import SessionEncoder
from llmgr_rec.modules.stamp import STAMP
from tests.modules.graphs import graphs_of, sessions_strategy
from tests.modules.test_encoders import DIM, SESSIONS, double_encoder, node_vectors

VARIANTS = [
    EncoderConfig(name="sasrec", dropout=0.0, attention_heads=2),
    EncoderConfig(name="sasrec", dropout=0.0, attention_layers=2, max_clicks=3),
    EncoderConfig(name="esasrec", dropout=0.0, attention_layers=2, attention_heads=2, max_clicks=3),
    EncoderConfig(name="hstu", dropout=0.0, attention_layers=2, attention_heads=2, max_clicks=3),
    EncoderConfig(name="gru4rec", dropout=0.0),
    EncoderConfig(name="gru4rec", dropout=0.0, max_clicks=2),
    EncoderConfig(name="stamp", dropout=0.0),
]


def plain_sasrec(encoder: SASRec, clicks_LD: Tensor) -> Tensor:
    hidden = clicks_LD + encoder.position_TD[: len(clicks_LD)]
    for block in encoder.blocks:
        mixed = []
        query, key, value = block.query_key_value(block.attention_norm(hidden)).chunk(3, 1)
        for q, k, v in zip(*(part.chunk(block.heads, 1) for part in (query, key, value)), strict=True):
            rows = []
            for place in range(len(hidden)):
                scores = k[: place + 1] @ q[place] / q.shape[1] ** 0.5
                rows.append(scores.softmax(0) @ v[: place + 1])
            mixed.append(torch.stack(rows))
        attended = block.project(torch.cat(mixed, 1))
        if isinstance(block, LiGRBlock):
            hidden = plain_gates(block, hidden, attended)
        else:
            hidden = hidden + attended
            hidden = hidden + block.contract(functional.gelu(block.expand(block.feed_forward_norm(hidden))))
    return encoder.norm(hidden)


def plain_gates(block: LiGRBlock, hidden: Tensor, attended: Tensor) -> Tensor:
    hidden = hidden + torch.sigmoid(block.attention_gate(hidden)) * attended
    activated, linear = block.expand(block.feed_forward_norm(hidden)).chunk(2, 1)
    added = block.contract(activated * torch.sigmoid(activated) * linear)
    return hidden + torch.sigmoid(block.feed_forward_gate(hidden)) * added


def plain_hstu(encoder: HSTU, clicks_LD: Tensor) -> Tensor:
    hidden = clicks_LD + encoder.position_TD[: len(clicks_LD)]
    for block in encoder.blocks:
        gate, *parts = functional.silu(block.expand(block.input_norm(hidden))).chunk(4, 1)
        rows = []
        for place in range(len(hidden)):
            heads = []
            for head, (q, k, v) in enumerate(zip(*(part.chunk(block.heads, 1) for part in parts), strict=True)):
                sums = torch.zeros_like(v[0])
                for before in range(place + 1):
                    weight = functional.silu(q[place] @ k[before] + block.distance_AT[head, place - before])
                    sums = sums + weight / encoder.max_clicks * v[before]
                heads.append(sums)
            rows.append(torch.cat(heads))
        hidden = hidden + block.project(gate * block.attended_norm(torch.stack(rows)))
    return encoder.norm(hidden)


def plain_gru4rec(encoder: GRU4Rec, clicks_LD: Tensor) -> Tensor:
    network, state, states = encoder.network, clicks_LD.new_zeros(DIM), []
    for click in clicks_LD:
        taken = (click @ network.weight_ih_l0.T + network.bias_ih_l0).chunk(3)
        kept = (state @ network.weight_hh_l0.T + network.bias_hh_l0).chunk(3)
        reset, update = (torch.sigmoid(taken[gate] + kept[gate]) for gate in (0, 1))
        state = (1 - update) * torch.tanh(taken[2] + reset * kept[2]) + update * state
        states.append(encoder.read_out(state))
    return torch.stack(states)


def plain_stamp(encoder: STAMP, clicks_LD: Tensor) -> Tensor:
    last, mean = clicks_LD[-1], clicks_LD.mean(0)
    attended = torch.zeros_like(last)
    for click in clicks_LD:
        hidden = encoder.attend_node(click) + encoder.attend_last(last) + encoder.attend_mean(mean)
        attended = attended + encoder.attend_score(hidden.sigmoid()) * click
    return torch.tanh(encoder.memory(attended)) * torch.tanh(encoder.last(last))


PLAIN = {HSTU: plain_hstu, SASRec: plain_sasrec, GRU4Rec: plain_gru4rec}


def encode_one_by_one(encoder: SessionEncoder, nodes_ND: Tensor, sessions: list[list[int]]) -> tuple[Tensor, Tensor]:
    states, vectors = [], []
    first = 0
    for session in sessions:
        items = list(dict.fromkeys(session))
        own_ND = nodes_ND[first : first + len(items)]
        first += len(items)
        if not session:
            vectors.append(nodes_ND.new_zeros(DIM))
            continue
        if isinstance(encoder, STAMP):
            states.append(own_ND)
            vectors.append(plain_stamp(encoder, own_ND[[items.index(item) for item in session]]))
            continue
        newest = session[-encoder.max_clicks :]
        plain = next(function for kind, function in PLAIN.items() if isinstance(encoder, kind))
        states_LD = plain(encoder, own_ND[[items.index(item) for item in newest]])
        vectors.append(states_LD[-1])
        last_click = {item: place for place, item in enumerate(newest)}
        states += [
            states_LD[last_click[item]].unsqueeze(0) if item in last_click else own_ND[[number]]
            for number, item in enumerate(items)
        ]
    return torch.cat([nodes_ND[:0], *states]), torch.stack(vectors)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@given(sessions=sessions_strategy)
@settings(deadline=None, max_examples=25)
def test_agrees_with_the_plain_version(config: EncoderConfig, sessions: list[list[int]]) -> None:
    encoder, graph = double_encoder(config), graphs_of(sessions)
    nodes_ND = node_vectors(graph)
    encoded = encoder(nodes_ND, graph)
    states_ND, sessions_BD = encode_one_by_one(encoder, nodes_ND, sessions)
    torch.testing.assert_close(encoded.states_ND, states_ND, rtol=0, atol=1e-10)
    torch.testing.assert_close(encoded.sessions_BD, sessions_BD, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_gradients_agree_with_the_plain_version(config: EncoderConfig) -> None:
    encoder, graph = double_encoder(config), graphs_of(SESSIONS)
    gradients = []
    for fast in (True, False):
        nodes_ND = node_vectors(graph).requires_grad_()
        vectors_BD = encoder(nodes_ND, graph).sessions_BD if fast else encode_one_by_one(encoder, nodes_ND, SESSIONS)[1]
        encoder.zero_grad()
        (vectors_BD * torch.arange(1.0, DIM + 1, dtype=torch.float64)).sin().sum().backward()
        gradients.append([nodes_ND.grad, *(p.grad for p in encoder.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_every_parameter_has_a_gradient_even_without_clicks(config: EncoderConfig) -> None:
    encoder, graph = double_encoder(config), graphs_of([[], []])
    encoded = encoder(node_vectors(graph), graph)
    assert torch.equal(encoded.sessions_BD, torch.zeros(2, DIM, dtype=torch.float64))
    (encoded.sessions_BD.sum() + encoded.states_ND.sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(("setting", "value"), [("attention_layers", 0), ("attention_heads", 3)])
def test_attention_that_cannot_be_built_is_told_of(setting: str, value: int) -> None:
    with pytest.raises(UserError, match=f"encoder.{setting} is {value}"):
        build_encoder(EncoderConfig(name="sasrec", **{setting: value}), DIM)
