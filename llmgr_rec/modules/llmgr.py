"""LLMGR (arXiv 2402.16539): a language model encodes a session recommender's vectors, and a head ranks items.

TorchRec's training pipeline traces the forward pass symbolically down to the table lookups. So it only accesses
attributes of the batch and calls modules, and never branches on a tensor.

Shapes: B sessions, P passes, N nodes, C candidates, V items, D = d1 columns, H = d2 hidden width, Q columns of queries
and item vectors.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_templates import Task
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.heads import RankingHead
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.prompts import CompiledPrompt, NodeOrder, PromptSet, one_pass_nodes, prompt_nodes
from llmgr_rec.modules.recommender import RecommenderOutput, SessionRecommender

if TYPE_CHECKING:
    from llmgr_rec.modules.language_model import LoraLanguageModel

torch.fx.wrap("embed_tokens")
torch.fx.wrap("encode_in_micro_batches")
torch.fx.wrap("prompt_nodes")
torch.fx.wrap("one_pass_nodes")


def embed_tokens(language_model: "LoraLanguageModel", tokens_X: Tensor) -> Tensor:
    """`LoraLanguageModel.embed` as a function that symbolic tracing does not enter."""
    return language_model.embed(tokens_X)


def encode_in_micro_batches(
    llmgr: "LLMGR",
    sessions_BD: Tensor,
    vectors_ND: Tensor,
    nodes: Jagged,
    text: Jagged,
    task: Task,
    pass_offsets_P1: Tensor | None,
) -> Tensor:
    """`LLMGR.encode_prompts` of a few prompts after the other, [B, H].

    The backward pass encodes them again, part by part, so that the activations of one part at a time are in memory. It
    adds up the gradients of all parts before anything uses them, as if the prompts had been encoded at once: an
    optimizer, a reduction over ranks or a fused optimizer of tables sees one gradient of the whole batch. The same was
    done for contrastive losses by Gao et al. (GradCache, arXiv 2101.06983).

    The number of parts is `LLMGR.micro_batches` on each rank, also where a rank has fewer prompts, because a language
    model that is sharded across ranks makes each of its calls on all of them.

    Args:
        llmgr: The model.
        sessions_BD: Session vectors, float32 [B, D].
        vectors_ND: Vectors of the nodes, float32 [N, D].
        nodes: Nodes of each prompt.
        text: Item texts of each output.
        task: Task whose prompts are encoded.
        pass_offsets_P1: First output of each prompt, int64 [P + 1], where one prompt has several; None for one each.

    Returns:
        Hidden states, float32 [B, H].
    """
    prompts, parts = nodes.num_rows, llmgr.micro_batches
    bounds = [prompts * part // parts for part in range(parts + 1)]
    # Read at once: each number that is read from a GPU waits for it.
    ends = range(prompts + 1) if pass_offsets_P1 is None else pass_offsets_P1.tolist()
    hidden = []
    for first, last in pairwise(bounds):
        # An empty part encodes a prompt whose result is not used.
        start, stop = (first, last) if first < last else (0, min(1, prompts))
        outputs = range(ends[start], ends[stop])
        offsets = None if pass_offsets_P1 is None else pass_offsets_P1[start : stop + 1] - outputs.start
        device = nodes.offsets.device
        encoded_BH = checkpoint(
            llmgr.encode_prompts,
            sessions_BD[outputs.start : outputs.stop],
            vectors_ND,
            nodes.select(torch.arange(start, stop, device=device)),
            text.select(torch.arange(outputs.start, outputs.stop, device=device)),
            task,
            offsets,
            use_reentrant=False,
        )
        hidden.append(encoded_BH if first < last else encoded_BH[:0])
    return torch.cat(hidden)


class LLMGR(nn.Module):
    """The model: session recommender, adapter, language model and head.

    Args:
        recommender: The pre-trained session recommender; it stays frozen.
        adapter: Projects its vectors to soft tokens.
        language_model: Encodes the prompts.
        head: Computes queries from hidden states, and item vectors.
        prompts: A compiled prompt for each task that is used.
        text: Table of text embeddings, see `text_tables`; required by a head that uses item text.
        node_source: Vectors at the placeholder {nodes}: rows of the item tables or states of the session encoder.
        node_order: Clicks in order with repeats, or each distinct item once in order of its last click.
        max_nodes: Number of newest nodes in a prompt; 0 includes all.
        micro_batches: Number of parts of a batch that are encoded one after the other in training; see
            `encode_in_micro_batches`.
    """

    rows_VD: Tensor | None
    item_rows_VD: Tensor | None
    text_VH: Tensor | None

    def __init__(
        self,
        recommender: SessionRecommender,
        adapter: ProjectionAdapter,
        language_model: "LoraLanguageModel",
        head: RankingHead,
        prompts: Mapping[Task, CompiledPrompt],
        text: EmbeddingBagCollection | None = None,
        node_source: Literal["table", "encoder"] = "table",
        node_order: NodeOrder = "clicks",
        max_nodes: int = 20,
        micro_batches: int = 1,
    ) -> None:
        super().__init__()
        self.recommender = recommender
        self.adapter = adapter
        self.language_model = language_model
        self.head = head
        self.prompts = PromptSet(prompts)
        self.text_tables = text
        self.node_source = node_source
        self.node_order: NodeOrder = node_order
        self.max_nodes = max_nodes
        self.micro_batches = micro_batches
        # Buffers, so that they move with the model; not persistent, because they are computed from the tables.
        for name in ("item_rows_VD", "rows_VD", "text_VH"):
            self.register_buffer(name, None, persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "LLMGR":
        """Sets the training mode, except of the session recommender, which is frozen and runs without dropout."""
        super().train(mode)
        self.recommender.eval()
        return self

    def forward(self, batch: SessionBatch, task: Task = "behave") -> Tensor:
        """Queries of a batch, [B, Q]; scores are queries @ item_vectors.T.

        Args:
            batch: Sessions, with or without candidates.
            task: Task whose prompt is encoded.
        """
        output = self.look_up(batch)
        return self.queries(output, self.encode(output, batch, task))

    @property
    def score_columns(self) -> dict[str, int]:
        """Number of columns of queries and item vectors that belong to each part of the score, in their order."""
        added = self.recommender.score_columns if self.head.residual else {}
        return {"llm": self.head.head_columns, **added}

    def look_up(self, batch: SessionBatch, one_pass: bool = False) -> RecommenderOutput:
        """The session recommender's output for a batch, without gradient.

        Args:
            batch: Sessions.
            one_pass: Whether they are encoded by `encode_one_pass`; the output then has no node states.
        """
        with torch.no_grad():
            return self.recommender(batch, shares_states=one_pass)

    def encode(self, output: RecommenderOutput, batch: SessionBatch, task: Task) -> Tensor:
        """Hidden state of the last token of each session's prompt, [B, H].

        Args:
            output: From `look_up`.
            batch: The same batch.
            task: Task whose prompt is encoded.
        """
        return self.encode_nodes(
            output, prompt_nodes(batch.graph, self.node_order, self.max_nodes), batch.text_tokens, task
        )

    def encode_one_pass(self, output: RecommenderOutput, batch: SessionBatch, task: Task) -> Tensor:
        """`encode` with one prompt for all prefixes of a pass, [B, H].

        The result equals that of `encode` if no session has more than `max_nodes` clicks. In a longer session, all
        prefixes of a pass start at the first node of its prompt. The shared node tokens must not depend on later
        clicks. This holds for rows of the item tables, but not for states of the session encoder. Each prefix has its
        separate graph token.

        Args:
            output: From `look_up`.
            batch: The same batch, with `pass_offsets_P1`.
            task: Task whose prompt is encoded.

        Raises:
            ValueError: Nodes are encoder states or distinct items, both of which depend on later clicks.
        """
        if self.node_source != "table" or self.node_order != "clicks":
            raise ValueError(
                "prefixes can share a prompt only if nodes are rows of the item tables in order of the clicks"
            )
        nodes = one_pass_nodes(batch.graph, batch.pass_offsets_P1)
        return self.encode_nodes(output, nodes, batch.text_tokens, task, batch.pass_offsets_P1)

    def encode_nodes(
        self, output: RecommenderOutput, nodes: Jagged, text: Jagged, task: Task, pass_offsets_P1: Tensor | None = None
    ) -> Tensor:
        """Encodes prompts that contain the given nodes.

        Args:
            output: From `look_up`.
            nodes: Node index in the batch of each node in the prompts, one row per prompt.
            text: Token ids at the placeholder {text}, one row per session.
            task: Task whose prompt is encoded.
            pass_offsets_P1: First session of each pass, int64; None encodes a separate prompt for each session.

        Returns:
            Hidden states, float32 [B, H].
        """
        vectors_ND = output.rows_ND if self.node_source == "table" else output.states_ND
        if self.micro_batches > 1 and torch.is_grad_enabled():
            return encode_in_micro_batches(self, output.sessions_BD, vectors_ND, nodes, text, task, pass_offsets_P1)
        return self.encode_prompts(output.sessions_BD, vectors_ND, nodes, text, task, pass_offsets_P1)

    def encode_prompts(
        self,
        sessions_BD: Tensor,
        vectors_ND: Tensor,
        nodes: Jagged,
        text: Jagged,
        task: Task,
        pass_offsets_P1: Tensor | None,
    ) -> Tensor:
        """`encode_nodes` from the vectors of sessions and nodes, [B, H]."""
        packed = self.prompts(task, nodes, text, pass_offsets_P1)
        embeddings_XH = self.adapter(
            embed_tokens(self.language_model, packed.token_ids_X),
            packed.soft_rows_X,
            sessions_BD,
            vectors_ND.index_select(0, nodes.values),
        )
        return self.language_model(embeddings_XH, packed)

    def queries(self, output: RecommenderOutput, hidden_BH: Tensor) -> Tensor:
        """Queries from hidden states, [B, Q]."""
        return self.head.queries(hidden_BH, output.queries_BQ)

    def recommender_queries(self, batch: SessionBatch) -> Tensor:
        """Queries that give the session recommender's scores, without the language model, [B, Q].

        Raises:
            ValueError: The head is not residual.
        """
        return self.head.recommender_only(self.look_up(batch).queries_BQ)

    def items(self, output: RecommenderOutput, batch: SessionBatch) -> Tensor:
        """Item vectors of the cached catalog or, without one, of the batch's candidates, [C, Q]."""
        if self.item_rows_VD is not None and self.rows_VD is not None:
            return self.head.items(self.item_rows_VD, self.rows_VD, self.text_VH, None)
        text_CH = None
        if self._uses_text:
            text_CH = self.head.standardize(self._texts(batch.features)[output.rows_ND.shape[0] :])
        return self.head.items(output.candidates_CQ, output.candidate_ids_CD, text_CH, batch.candidates_C)

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Item vectors of any items, [C, Q]; ranking computes them once.

        Args:
            features: A bag for each item; see `ItemTables.forward`.
        """
        rows = self.rows(features)
        ids_C = features[ITEM_ID].values()
        return self.head.items(self.recommender.as_items(rows), rows.ids_XD, self._head_texts(rows), ids_C)

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up the table rows of items, text embeddings included if the head uses them.

        Args:
            features: A bag for each item; see `ItemTables.forward`.
        """
        rows = self.recommender.rows(features)
        return replace(rows, texts_XH=self._texts(features)) if self._uses_text else rows

    def cache_catalog(self, rows: ItemRows, text_dtype: torch.dtype = torch.float32) -> None:
        """Caches the table rows of the whole catalog; the tables are frozen.

        Afterwards each training step scores the whole catalog without a lookup, and batches need no candidates.

        Args:
            rows: Rows of all items, from `rows`, in index order.
            text_dtype: Dtype of the text embeddings and of the head's products with them.
        """
        with torch.no_grad():
            self.item_rows_VD = self.recommender.as_items(rows)
            text_VH = self._head_texts(rows)
            self.text_VH = None if text_VH is None else text_VH.to(text_dtype)
        self.rows_VD = rows.ids_XD.detach()

    @property
    def _uses_text(self) -> bool:
        return self.head.uses_text

    def _head_texts(self, rows: ItemRows) -> Tensor | None:
        return self.head.standardize(rows.texts_XH) if self._uses_text and rows.texts_XH is not None else None

    def _texts(self, features: KeyedJaggedTensor) -> Tensor:
        if self.text_tables is None:
            raise ValueError("the head uses item text, but the model was built without text embeddings")
        with torch.no_grad():
            return self.text_tables(features).values()
