"""LLMGR: a session recommender whose graph vectors a LoRA-tuned language model reads, and a head that ranks items.

The forward pass down to the table lookups is traced symbolically by TorchRec's pipelines: it takes attributes of the
batch and calls modules, and never branches on a tensor.

Shapes: B sessions, G prompts that several of them share, N nodes, C candidates, V items, D = d1 columns, H = d2 hidden
width, Q columns of queries and items.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_templates import Task
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.heads import RankingHead
from llmgr_rec.modules.item_tables import ItemRows
from llmgr_rec.modules.language_model import LoraLanguageModel
from llmgr_rec.modules.prompts import CompiledPrompt, NodeOrder, PromptSet, one_pass_nodes, prompt_nodes
from llmgr_rec.modules.recommender import RecommenderOutput, SessionRecommender

torch.fx.wrap("embed_tokens")
torch.fx.wrap("prompt_nodes")
torch.fx.wrap("one_pass_nodes")


def embed_tokens(language_model: LoraLanguageModel, tokens_X: Tensor) -> Tensor:
    """`LoraLanguageModel.embed` as a function, which symbolic tracing does not enter."""
    return language_model.embed(tokens_X)


class LLMGR(nn.Module):
    """The whole model.

    Args:
        recommender: The pre-trained session recommender.
        adapter: Puts its vectors among token embeddings, as soft tokens.
        language_model: Encodes the prompts.
        head: Turns hidden states into queries, and items into the vectors that they are compared with.
        prompts: A compiled prompt for each task that is used.
        text: Text encodings of the items, see `text_tables`; needed by a head with item text.
        node_source: Vectors at the {nodes} places: rows of the item tables or states of the session encoder.
        node_order: Clicks in order with repeats, or each distinct item once in order of its last click.
        max_nodes: Newest nodes kept in a prompt; 0 keeps all.
    """

    rows_VD: Tensor | None
    item_rows_VD: Tensor | None
    text_VH: Tensor | None

    def __init__(
        self,
        recommender: SessionRecommender,
        adapter: ProjectionAdapter,
        language_model: LoraLanguageModel,
        head: RankingHead,
        prompts: Mapping[Task, CompiledPrompt],
        text: EmbeddingBagCollection | None = None,
        node_source: Literal["table", "encoder"] = "table",
        node_order: NodeOrder = "clicks",
        max_nodes: int = 20,
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
        # Buffers, so that they move with the model; not persistent, because they are made from the tables.
        for name in ("item_rows_VD", "rows_VD", "text_VH"):
            self.register_buffer(name, None, persistent=False)

    def train(self, mode: bool = True) -> "LLMGR":
        """Switches training mode of all but the session recommender, which is frozen and runs without dropout."""
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

    def look_up(self, batch: SessionBatch) -> RecommenderOutput:
        """The session recommender's output for a batch, without gradient."""
        with torch.no_grad():
            return self.recommender(batch)

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
        """The same readings from prompts that growing prefixes of a session share, [B, H].

        They are the same as long as no session is longer than a prompt shows: of a longer one, the prefixes that share
        a prompt see its nodes from the first one on. What they share must know nothing of later clicks, which is so for
        rows of the item tables, and not for states of the session encoder; the graph token is each prefix's own.

        Args:
            output: From `look_up`.
            batch: The same batch, which says what shares a prompt.
            task: Task whose prompt is encoded.

        Raises:
            ValueError: Nodes are encoder states or distinct items, both of which depend on later clicks.
        """
        if self.node_source != "table" or self.node_order != "clicks":
            raise ValueError(
                "prefixes share a prompt only where nodes are rows of the item tables in order of the clicks"
            )
        nodes = one_pass_nodes(batch.graph, batch.pass_offsets_P1)
        return self.encode_nodes(output, nodes, batch.text_tokens, task, batch.pass_offsets_P1)

    def encode_nodes(
        self, output: RecommenderOutput, nodes: Jagged, text: Jagged, task: Task, pass_offsets_P1: Tensor | None = None
    ) -> Tensor:
        """Encodes prompts with given nodes.

        Args:
            output: From `look_up`.
            nodes: Global node index of each shown node, one row a prompt.
            text: Token ids of the text place, one row a session.
            task: Task whose prompt is encoded.
            pass_offsets_P1: First session of each pass; None where each session has a prompt of its own.

        Returns:
            Hidden states, float32 [B, H].
        """
        packed = self.prompts(task, nodes, text, pass_offsets_P1)
        vectors_ND = output.rows_ND if self.node_source == "table" else output.states_ND
        embeddings_XH = self.adapter(
            embed_tokens(self.language_model, packed.token_ids_X),
            packed.soft_rows_X,
            output.sessions_BD,
            vectors_ND.index_select(0, nodes.values),
        )
        return self.language_model(embeddings_XH, packed)

    def queries(self, output: RecommenderOutput, hidden_BH: Tensor) -> Tensor:
        """Queries from hidden states, [B, Q]."""
        return self.head.queries(hidden_BH, output.queries_BQ)

    def recommender_queries(self, batch: SessionBatch) -> Tensor:
        """Queries whose scores are those of the session recommender alone, without the language model, [B, Q].

        Raises:
            ValueError: The head does not add the recommender's score.
        """
        return self.head.recommender_only(self.look_up(batch).queries_BQ)

    def items(self, output: RecommenderOutput, batch: SessionBatch) -> Tensor:
        """Items' side of the score: the cached catalog, or the batch's candidates, [C, Q]."""
        if self.item_rows_VD is not None and self.rows_VD is not None:
            return self.head.items(self.item_rows_VD, self.rows_VD, self.text_VH, None)
        text_CH = None
        if self._uses_text:
            text_CH = self.head.standardize(self._texts(batch.features)[output.rows_ND.shape[0] :])
        return self.head.items(output.candidates_CQ, output.candidate_ids_CD, text_CH, batch.candidates_C)

    def item_vectors(self, features: KeyedJaggedTensor) -> Tensor:
        """Items' side of the score for any items, [C, Q]: for ranking, where item vectors are made once.

        Args:
            features: A bag for each item.
        """
        rows = self.rows(features)
        ids_C = features[ITEM_ID].values()
        return self.head.items(self.recommender.as_items(rows), rows.ids_XD, self._head_texts(rows), ids_C)

    def rows(self, features: KeyedJaggedTensor) -> ItemRows:
        """Looks up all that items' vectors are made of, text encodings too where the head reads them.

        Args:
            features: A bag for each item.
        """
        rows = self.recommender.rows(features)
        return replace(rows, texts_XH=self._texts(features)) if self._uses_text else rows

    def cache_catalog(self, rows: ItemRows) -> None:
        """Caches the inputs of all item vectors, whose tables are frozen.

        Batches then need no candidates: each step scores the whole catalog without looking it up again.

        Args:
            rows: All items as `rows` looks them up, in item order.
        """
        with torch.no_grad():
            self.item_rows_VD = self.recommender.as_items(rows)
            self.text_VH = self._head_texts(rows)
        self.rows_VD = rows.ids_XD.detach()

    @property
    def _uses_text(self) -> bool:
        return self.head.uses_text

    def _head_texts(self, rows: ItemRows) -> Tensor | None:
        return self.head.standardize(rows.texts_XH) if self._uses_text and rows.texts_XH is not None else None

    def _texts(self, features: KeyedJaggedTensor) -> Tensor:
        if self.text_tables is None:
            raise ValueError("the head reads item text, but the model was built without text encodings")
        with torch.no_grad():
            return self.text_tables(features).values()
