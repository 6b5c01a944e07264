"""Training tasks: modules that turn a batch into (loss, parts), the form that TorchRec's pipelines drive.

Shapes: B sessions, R hard negatives a session, M shown nodes, H = d2 hidden width.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.losses import ranking_loss, structure_loss
from llmgr_rec.modules.prompts import prompt_nodes
from llmgr_rec.modules.recommender import RecommenderOutput, SessionRecommender

torch.fx.wrap("ranking_loss")
torch.fx.wrap("structure_loss")
torch.fx.wrap("prompt_nodes")
torch.fx.wrap("_corrupt")
torch.fx.wrap("_groups")

LossAndParts = tuple[Tensor, dict[str, Tensor]]


# Sessions that are set against each other, as many as the paper's batch has.
CONTRASTIVE_GROUP = 16


class SbrTask(nn.Module):
    """Session-recommender pre-training: next-item ranking by the recommender's own score.

    Args:
        recommender: The session recommender.
        world_size: Number of ranks, over which gradients are averaged.
        loss_dtype: Number format of the products with the items in the loss, see `ranking_loss`.
        one_pass: Read prefixes of a session in one pass; its batches then say which belong together.
    """

    def __init__(
        self,
        recommender: SessionRecommender,
        world_size: int = 1,
        loss_dtype: torch.dtype = torch.float32,
        one_pass: bool = False,
    ) -> None:
        super().__init__()
        self.recommender = recommender
        self.world_size = world_size
        self.loss_dtype = loss_dtype
        self.one_pass = one_pass

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch with candidates, and its parts without gradient."""
        output = self.recommender(batch, self.one_pass)
        loss = _ranking(output.queries_BQ, output.candidates_CQ, batch, self.world_size, self.loss_dtype)
        return loss, {"loss": loss.detach()}


class LLMTextTask(nn.Module):
    """Training of the text encoder: next-item ranking by its score alone, whatever the session encoder would say.

    Args:
        recommender: A session recommender with a text encoder.
        world_size: Number of ranks, over which gradients are averaged.
        loss_dtype: Number format of the products with the items in the loss, see `ranking_loss`.

    Raises:
        ValueError: It has no text encoder.
    """

    def __init__(
        self, recommender: SessionRecommender, world_size: int = 1, loss_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if recommender.text_encoder is None:
            raise ValueError("the recommender was built without a text encoder")
        self.recommender = recommender
        self.world_size = world_size
        self.loss_dtype = loss_dtype

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch with candidates, and its parts without gradient."""
        queries_BK, candidates_CK = self.recommender.read_texts(batch)
        loss = _ranking(queries_BK, candidates_CK, batch, self.world_size, self.loss_dtype)
        return loss, {"loss": loss.detach()}


class BehaveTask(nn.Module):
    """Stage 2, behavior pattern modeling: the next item from the session's graph and nodes.

    Args:
        llmgr: The model.
        world_size: Number of ranks, over which gradients are averaged.
        one_pass: Read prefixes of a session in one prompt; its batches then say which share one.
    """

    def __init__(self, llmgr: LLMGR, world_size: int = 1, one_pass: bool = False) -> None:
        super().__init__()
        self.llmgr = llmgr
        self.world_size = world_size
        self.one_pass = one_pass

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch, and its parts without gradient."""
        output = self.llmgr.look_up(batch)
        hidden_BH = _encode(self.llmgr, output, batch, self.one_pass)
        loss = _ranking(*_trained(self.llmgr, output, hidden_BH, batch), batch, self.world_size)
        return loss, {"loss": loss.detach()}


class AlignTask(nn.Module):
    """Stage 1, auxiliary instruction tuning: node-context alignment plus the structure-aware contrast.

    Node-context alignment shows the session's nodes and the text of one of them, and asks for that item. The contrast
    sets the reading of a session's graph token against the reading of its node list and of others'.

    Args:
        llmgr: The model.
        contrastive_weight: Weight of the structure-aware loss; at 0 its prompts are not read.
        contrastive_temperature: Divisor of its cosine similarities.
        hard_negatives: Corrupted node lists (one node replaced by another session's) for each session.
        contrastive_group: Sessions that are negatives of each other, in order of the batch. Groups, and not the whole
            batch, so that the loss does not depend on how many ranks share a batch (as long as each rank's part is a
            multiple of the group).
        world_size: Number of ranks, over which gradients are averaged.
    """

    def __init__(
        self,
        llmgr: LLMGR,
        contrastive_weight: float,
        contrastive_temperature: float,
        hard_negatives: int,
        contrastive_group: int = CONTRASTIVE_GROUP,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.llmgr = llmgr
        self.contrastive_weight = contrastive_weight
        self.contrastive_temperature = contrastive_temperature
        self.hard_negatives = hard_negatives
        self.contrastive_group = contrastive_group
        self.world_size = world_size

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch, and its parts without gradient."""
        output = self.llmgr.look_up(batch)
        hidden_BH = self.llmgr.encode(output, batch, "align")
        context = _ranking(*_trained(self.llmgr, output, hidden_BH, batch), batch, self.world_size)
        if self.contrastive_weight == 0:
            return context, {"loss": context.detach()}
        structure = self._structure(output, batch)
        loss = context + self.contrastive_weight * structure
        return loss, {"loss": loss.detach(), "context": context.detach(), "structure": structure.detach()}

    def _structure(self, output: RecommenderOutput, batch: SessionBatch) -> Tensor:
        nodes = prompt_nodes(batch.graph, self.llmgr.node_order, self.llmgr.max_nodes)
        graphs_BH = self.llmgr.encode_nodes(output, nodes, batch.text_tokens, "structure_graph")
        nodes_BH = self.llmgr.encode_nodes(output, nodes, batch.text_tokens, "structure_nodes")
        hard = []
        for number in range(self.hard_negatives):
            corrupted = _corrupt(nodes, batch, number, self.contrastive_group)
            hard.append(self.llmgr.encode_nodes(output, corrupted, batch.text_tokens, "structure_nodes"))
        return structure_loss(
            graphs_BH,
            nodes_BH,
            batch.weights_B,
            batch.global_size,
            self.world_size,
            self.contrastive_temperature,
            torch.stack(hard, dim=1) if hard else None,
            _groups(batch, self.contrastive_group),
        )


def _encode(llmgr: LLMGR, output: RecommenderOutput, batch: SessionBatch, one_pass: bool) -> Tensor:
    return llmgr.encode_one_pass(output, batch, "behave") if one_pass else llmgr.encode(output, batch, "behave")


def _trained(llmgr: LLMGR, output: RecommenderOutput, hidden_BH: Tensor, batch: SessionBatch) -> tuple[Tensor, Tensor]:
    """Both sides of the score that is trained: the head's own, or with the recommender's."""
    own = slice(llmgr.head.trained_columns)
    return llmgr.queries(output, hidden_BH)[:, own], llmgr.items(output, batch)[:, own]


def _ranking(
    queries_BQ: Tensor, items_CQ: Tensor, batch: SessionBatch, world_size: int, dtype: torch.dtype | None = None
) -> Tensor:
    return ranking_loss(
        queries_BQ,
        items_CQ,
        batch.target_columns_B,
        batch.weights_B,
        batch.global_size,
        world_size,
        batch.log_q_C,
        dtype,
    )


def _groups(batch: SessionBatch, size: int) -> Tensor:
    """Group of each session of the batch: consecutive sessions, `size` in each."""
    return torch.arange(batch.weights_B.numel(), device=batch.weights_B.device) // size


def _corrupt(nodes: Jagged, batch: SessionBatch, number: int, group: int) -> Jagged:
    """Replaces one shown node of each session by one of another session of its group.

    Place and replacement follow from the session's row number, so neither other rows nor ranks have a part in it. A
    session alone in its group keeps its list.

    Args:
        nodes: Shown nodes, one row a session, each row not empty.
        batch: The sessions.
        number: Number of the hard negative; each replaces another node or takes another session's.
        group: Sessions in a group.
    """
    batch_size = nodes.num_rows
    session_B = torch.arange(batch_size, device=nodes.values.device)
    first_B = session_B // group * group
    width_B = (batch_size - first_B).clamp(max=group)
    # Another session of the group: 1 .. width - 1 places on, round the end of the group.
    shift_B = 1 + number % (width_B - 1).clamp(min=1)
    other_B = first_B + (session_B - first_B + shift_B) % width_B
    lengths_B, starts_B = nodes.lengths, nodes.offsets[:-1]
    noise_B = (batch.rows_B + batch.epoch + number).abs()
    place_B = starts_B + noise_B % lengths_B
    source_B = starts_B[other_B] + noise_B % lengths_B[other_B]
    values = nodes.values.index_copy(0, place_B, nodes.values[source_B])
    return Jagged(values, nodes.offsets)
