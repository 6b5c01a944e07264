"""Training tasks: modules that compute (loss, logged values) of a batch, as TorchRec's training pipeline requires.

Shapes: B sessions, C candidates, K columns of the text encoder, Q columns of queries and item vectors, H = d2 hidden
width.
"""

import torch
from torch import Tensor, nn

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.kernels.softmax_loss import ranking_loss
from llmgr_rec.modules.contrastive_loss import contrastive_loss
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.prompts import prompt_nodes
from llmgr_rec.modules.recommender import RecommenderOutput, SessionRecommender
from llmgr_rec.modules.whole_catalog import WholeCatalog

torch.fx.wrap("ranking_loss")
torch.fx.wrap("contrastive_loss")
torch.fx.wrap("prompt_nodes")
torch.fx.wrap("_contrast_groups")

LossAndParts = tuple[Tensor, dict[str, Tensor]]


# Sessions that are negatives of each other in the contrastive loss: the batch size of the paper.
CONTRASTIVE_GROUP = 16
# Divisor of the cosine similarities of the structure-aware loss.
CONTRASTIVE_TEMPERATURE = 0.07


class SbrTask(nn.Module):
    """Pre-training of the session recommender by next-item ranking.

    Args:
        recommender: The session recommender.
        world_size: Number of ranks, over which gradients are averaged.
        loss_dtype: Dtype of the scores in the loss, see `ranking_loss`, and of the encoder's products, see
            `SessionEncoder.train_in`.
        one_pass: Whether to encode all prefixes of a session in one pass; batches then need `pass_offsets_P1`.
        catalog: Makes the vectors of all items, see `SessionRecommender.forward`.
    """

    def __init__(
        self,
        recommender: SessionRecommender,
        world_size: int = 1,
        loss_dtype: torch.dtype = torch.float32,
        one_pass: bool = False,
        catalog: WholeCatalog | None = None,
    ) -> None:
        super().__init__()
        self.recommender = recommender
        self.world_size = world_size
        self.loss_dtype = loss_dtype
        recommender.encoder.train_in(loss_dtype)
        self.one_pass = one_pass
        self.catalog = catalog

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch with candidates, and the values to log, detached."""
        output = self.recommender(batch, self.one_pass, self.catalog)
        loss = _ranking_loss(output.queries_BQ, output.candidates_CQ, batch, self.world_size, self.loss_dtype)
        return loss, {"loss": loss.detach()}


class LLMTextTask(nn.Module):
    """Training of the text sequence encoder by next-item ranking, without the session encoder's score.

    Args:
        recommender: A session recommender with a text encoder.
        world_size: Number of ranks, over which gradients are averaged.
        loss_dtype: Dtype of the scores in the loss, see `ranking_loss`.

    Raises:
        ValueError: The recommender has no text encoder.
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
        """Loss of a batch with candidates, and the values to log, detached."""
        queries_BK, candidates_CK = self.recommender.encode_texts(batch)
        loss = _ranking_loss(queries_BK, candidates_CK, batch, self.world_size, self.loss_dtype)
        return loss, {"loss": loss.detach()}


class BehaveTask(nn.Module):
    """Stage 2 of LLMGR (arXiv 2402.16539), behavior pattern modeling: next-item ranking from graph and nodes.

    Args:
        llmgr: The model.
        world_size: Number of ranks, over which gradients are averaged.
        one_pass: Whether all prefixes of a session share one prompt; batches then need `pass_offsets_P1`.
        loss_dtype: Dtype of the scores in the loss, see `ranking_loss`.
    """

    def __init__(
        self,
        llmgr: LLMGR,
        world_size: int = 1,
        one_pass: bool = False,
        loss_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.llmgr = llmgr
        self.world_size = world_size
        self.one_pass = one_pass
        self.loss_dtype = loss_dtype

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch, and the values to log, detached."""
        output = self.llmgr.look_up(batch, self.one_pass)
        hidden_BH = _encode(self.llmgr, output, batch, self.one_pass)
        vectors = _trained_columns(self.llmgr, output, hidden_BH, batch)
        loss = _ranking_loss(*vectors, batch, self.world_size, self.loss_dtype)
        return loss, {"loss": loss.detach()}


class AlignTask(nn.Module):
    """Stage 1 of LLMGR (arXiv 2402.16539), auxiliary instruction tuning: node-context alignment and structure contrast.

    The prompt of node-context alignment contains the session's nodes and the text of one of them, which is the target.
    The structure-aware contrastive loss compares the hidden state of the prompt with the session's graph token to those
    of prompts with node lists, see `contrastive_loss`.

    Args:
        llmgr: The model.
        contrastive_weight: Weight of the structure-aware loss; 0 skips its prompts.
        contrastive_group: Number of consecutive sessions that are negatives of each other. With groups instead of whole
            batches, the loss does not depend on the number of ranks, if a rank's batch is a multiple of the group.
        world_size: Number of ranks, over which gradients are averaged.
        loss_dtype: Dtype of the scores in the loss of node-context alignment, see `ranking_loss`.
    """

    def __init__(
        self,
        llmgr: LLMGR,
        contrastive_weight: float,
        *,
        contrastive_group: int = CONTRASTIVE_GROUP,
        world_size: int = 1,
        loss_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.llmgr = llmgr
        self.contrastive_weight = contrastive_weight
        self.contrastive_group = contrastive_group
        self.world_size = world_size
        self.loss_dtype = loss_dtype

    def forward(self, batch: SessionBatch) -> LossAndParts:
        """Loss of a batch, and the values to log, detached."""
        output = self.llmgr.look_up(batch)
        hidden_BH = self.llmgr.encode(output, batch, "align")
        vectors = _trained_columns(self.llmgr, output, hidden_BH, batch)
        context = _ranking_loss(*vectors, batch, self.world_size, self.loss_dtype)
        if self.contrastive_weight == 0:
            return context, {"loss": context.detach()}
        structure = self._structure(output, batch)
        loss = context + self.contrastive_weight * structure
        return loss, {"loss": loss.detach(), "context": context.detach(), "structure": structure.detach()}

    def _structure(self, output: RecommenderOutput, batch: SessionBatch) -> Tensor:
        nodes = prompt_nodes(batch.graph, self.llmgr.node_order, self.llmgr.max_nodes)
        graphs_BH = self.llmgr.encode_nodes(output, nodes, batch.text_tokens, "structure_graph")
        nodes_BH = self.llmgr.encode_nodes(output, nodes, batch.text_tokens, "structure_nodes")
        return contrastive_loss(
            graphs_BH,
            nodes_BH,
            batch.weights_B,
            batch.global_size,
            self.world_size,
            CONTRASTIVE_TEMPERATURE,
            _contrast_groups(batch, self.contrastive_group),
        )


def _encode(llmgr: LLMGR, output: RecommenderOutput, batch: SessionBatch, one_pass: bool) -> Tensor:
    return llmgr.encode_one_pass(output, batch, "behave") if one_pass else llmgr.encode(output, batch, "behave")


def _trained_columns(
    llmgr: LLMGR, output: RecommenderOutput, hidden_BH: Tensor, batch: SessionBatch
) -> tuple[Tensor, Tensor]:
    """Queries and item vectors of the score in the loss, without the recommender's columns if `head.separate_loss`."""
    with llmgr.head.trained_columns_only():
        return llmgr.queries(output, hidden_BH), llmgr.items(output, batch)


def _ranking_loss(
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


def _contrast_groups(batch: SessionBatch, size: int) -> Tensor:
    """Group of each session, int64 [B]: `size` consecutive sessions each."""
    return torch.arange(batch.weights_B.numel(), device=batch.weights_B.device) // size
