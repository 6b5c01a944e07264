"""The session recommender: one score by every way to it, and a training step that TorchRec's pipeline can trace."""

from typing import Literal
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from llmgr_rec.config import EncoderConfig
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.kernels.softmax_loss import ranking_loss
from llmgr_rec.modules import gated_graph
from llmgr_rec.modules.encoders import build_encoder
from llmgr_rec.modules.item_tables import ItemTables
from llmgr_rec.modules.query_encoder import MeasuredItems, QueryEncoder, QueryItems
from llmgr_rec.modules.recommender import SessionRecommender, normalize
from tests.modules.graphs import NUM_CATEGORIES, NUM_ITEMS, batch_of, features_of
from tests.modules.small_llmgr import one_pass_batch

torch.fx.wrap("ranking_loss")

DIM = 8
Score = Literal["dot", "cosine"]
Encoder = Literal["gcsan", "srgnn", "sasrec"]


def recommender_of(score: Score = "cosine", name: Encoder = "gcsan") -> SessionRecommender:
    torch.manual_seed(0)
    tables = ItemTables(NUM_ITEMS, {"category": NUM_CATEGORIES}, DIM)
    return SessionRecommender(tables, build_encoder(EncoderConfig(name=name, dropout=0.0), DIM), score, 0.1)


def small_batch() -> SessionBatch:
    return batch_of([[1, 2, 3, 2, 4], [5], [], [7, 7, 0]], [5, 6, 1, -1])


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_one_lookup_gives_what_separate_calls_give(score: Score) -> None:
    recommender, batch = recommender_of(score), small_batch()
    joint = recommender(batch)
    encoded = recommender.encode(batch.features, batch.graph)
    torch.testing.assert_close(joint.states_ND, encoded.states_ND)
    torch.testing.assert_close(joint.sessions_BD, encoded.sessions_BD)
    torch.testing.assert_close(joint.queries_BQ, recommender.queries(batch))
    torch.testing.assert_close(joint.candidates_CQ, recommender.item_vectors(features_of(torch.arange(NUM_ITEMS))))
    nodes = features_of(batch.graph.node_items_N)
    torch.testing.assert_close(joint.rows_ND, recommender.item_tables(nodes))
    torch.testing.assert_close(joint.states_ND, recommender.encode(nodes, batch.graph).states_ND)
    assert torch.equal(joint.candidate_ids_CD, recommender.item_tables.ebc.embedding_bags["item_id"].weight)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_queries_from_the_vectors_of_all_items(score: Score) -> None:
    recommender, batch = recommender_of(score).eval(), small_batch()
    items = MeasuredItems(recommender, NUM_ITEMS)
    items_VD = items.item_vectors(features_of(torch.arange(NUM_ITEMS)))
    torch.testing.assert_close(items_VD, recommender.item_vectors(features_of(torch.arange(NUM_ITEMS))))
    for limit in (1 << 27, 0):
        with mock.patch.object(gated_graph, "_MAX_PREPARED_BYTES", limit):
            encoder = QueryEncoder(recommender, QueryItems(items_VD, items.lengths()))
            torch.testing.assert_close(encoder.queries(batch.graph), recommender.queries(batch))


def test_scores_are_cosines_over_temperature_or_dot_products() -> None:
    for score in ("cosine", "dot"):
        recommender, batch = recommender_of(score), small_batch()
        output = recommender(batch)
        scores_BC = output.queries_BQ @ output.candidates_CQ.T
        items_CD = recommender.item_tables(features_of(torch.arange(NUM_ITEMS)))
        sessions_BD = output.sessions_BD
        expected_BC = sessions_BD @ items_CD.T
        if score == "cosine":
            expected_BC = functional.cosine_similarity(sessions_BD[:, None], items_CD[None], dim=2) / 0.1
        torch.testing.assert_close(scores_BC, expected_BC, rtol=0, atol=1e-5)


def loss_of(recommender: SessionRecommender, batch: SessionBatch) -> Tensor:
    output = recommender(batch)
    return ranking_loss(
        output.queries_BQ, output.candidates_CQ, batch.target_columns_B, batch.weights_B, batch.global_size, 1
    )


@pytest.mark.parametrize("name", ["gcsan", "srgnn"])
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_every_parameter_learns(name: Encoder, score: Score) -> None:
    recommender = recommender_of(score, name)
    loss_of(recommender, small_batch()).backward()
    for parameter_name, parameter in recommender.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, parameter_name
        assert gradient.isfinite().all(), parameter_name
        assert gradient.abs().sum() > 0, parameter_name


def test_filler_rows_have_no_part_in_loss_or_gradient() -> None:
    losses_and_gradients = []
    for sessions, targets in ([[1, 2], [3]], [4, 5]), ([[1, 2], [3], [9, 10]], [4, 5, -1]):
        recommender = recommender_of()
        loss = loss_of(recommender, batch_of(sessions, targets))
        loss.backward()
        losses_and_gradients.append([loss.detach(), *(parameter.grad for parameter in recommender.parameters())])
    torch.testing.assert_close(*losses_and_gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gcsan", "srgnn"])
def test_learns_which_item_follows(name: Encoder) -> None:
    recommender = recommender_of("cosine", name)
    sessions = [[(start + step) % NUM_ITEMS for step in range(length)] for start in range(12) for length in (1, 2, 3)]
    targets = [(session[-1] + 1) % NUM_ITEMS for session in sessions]
    batch = batch_of(sessions, targets)
    optimizer = torch.optim.Adam(recommender.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(recommender, batch).backward()
        optimizer.step()
    output = recommender(batch)
    best_B = (output.queries_BQ @ output.candidates_CQ.T).argmax(1)
    assert (best_B == batch.targets_B).float().mean() > 0.95


class Parent(nn.Module):
    """A task as a training pipeline sees it."""

    def __init__(self, recommender: SessionRecommender, one_pass: bool = False) -> None:
        super().__init__()
        self.recommender = recommender
        self.one_pass = one_pass

    def forward(self, batch: SessionBatch) -> Tensor:
        output = self.recommender(batch, self.one_pass)
        return ranking_loss(
            output.queries_BQ, output.candidates_CQ, batch.target_columns_B, batch.weights_B, batch.global_size, 1
        )


@pytest.mark.parametrize(
    ("name", "one_pass"), [("gcsan", False), ("srgnn", False), ("sasrec", False), ("sasrec", True)]
)
def test_forward_is_traceable_with_the_batch_untouched_before_the_lookup(name: Encoder, one_pass: bool) -> None:
    """What TrainPipelineSparseDist needs: fx traces the parent, and the lookup takes an attribute of the batch."""
    parent = Parent(recommender_of("cosine", name), one_pass)
    leaves = {"recommender.item_tables.ebc", "recommender.encoder"}

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
            return qualified_name in leaves

    graph = Tracer().trace(parent)
    (lookup,) = [node for node in graph.nodes if node.target == "recommender.item_tables.ebc"]
    (argument,) = lookup.args
    assert (argument.op, argument.args[1], argument.args[0].op) == ("call_function", "features", "placeholder")
    batch = one_pass_batch(longest_nodes=True) if one_pass else small_batch()
    torch.testing.assert_close(torch.fx.GraphModule(parent, graph)(batch), parent(batch))


def test_normalize_is_torchs_own_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(6, 5, dtype=torch.float64)
    vectors[2], vectors[3] = 0, 1e-13
    vectors.requires_grad_()
    coming = torch.randn_like(vectors)
    ours, theirs = normalize(vectors), torch.nn.functional.normalize(vectors, dim=1)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(value, vectors, coming)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients)
