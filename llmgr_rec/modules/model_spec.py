"""ModelSpec: the model of a training stage, from which planning, training, bundle loading and scoring build it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from llmgr_rec.config import PROMPT_STAGES, Config, StageName
from llmgr_rec.data.collate import CandidateSource, PromptTextSource
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.prompt_templates import Task
from llmgr_rec.errors import UserError
from llmgr_rec.modules.adapter import ProjectionAdapter
from llmgr_rec.modules.encoders import build_encoder, encoder_class
from llmgr_rec.modules.heads import build_head, head_class
from llmgr_rec.modules.item_tables import ItemTables
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.param_groups import ParamGroup
from llmgr_rec.modules.prompts import CompiledPrompt
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.modules.tasks import AlignTask, BehaveTask, LLMTextTask, SbrTask
from llmgr_rec.modules.text_sequence_encoder import TextSequenceEncoder
from llmgr_rec.modules.text_table import text_tables
from llmgr_rec.modules.whole_catalog import WholeCatalog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a batch is for: training of the stage, or ranking with its model.
Purpose = Literal["train", "rank"]

_TRAINS: dict[StageName, tuple[ParamGroup, ...]] = {
    "sbr": ("tables", "encoder"),
    "align": ("adapter", "head"),
    "behave": ("adapter", "lora", "head"),
    "llm_text": ("text_encoder",),
}


@dataclass(frozen=True)
class LanguageParts:
    """The parts of a language model that a stage's model is built from.

    Args:
        decoder: The decoder without head, on the device of the model or on `meta`; building modifies it in place.
        prompts: A compiled prompt per task; used by the stages align and behave.
        item_tokens: Token ids of each item's text with its end token, one row per item; used by stage llm_text.
        embedding_norm: Mean norm of the decoder's token embeddings; None computes it.
    """

    decoder: "PreTrainedModel"
    prompts: Mapping[Task, CompiledPrompt]
    item_tokens: Jagged
    embedding_norm: float | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Parts of the model of a stage, their widths, and which of them train.

    Args:
        stage: Stage.
        config: All settings.
        num_items: Size V of the catalog.
        num_embeddings: Vocabulary size of each side feature of the catalog.
    """

    stage: StageName
    config: Config
    num_items: int
    num_embeddings: Mapping[str, int]

    @property
    def trains(self) -> tuple[ParamGroup, ...]:
        """Parameter groups that the stage trains; all others are frozen."""
        return _TRAINS[self.stage]

    @property
    def encodes_prompts(self) -> bool:
        """Whether the model is LLMGR, whose language model encodes prompts with soft tokens."""
        return self.stage in PROMPT_STAGES

    @property
    def encodes_text(self) -> bool:
        """Whether a language model encodes sessions as the texts of their items."""
        return self.stage == "llm_text"

    @property
    def has_language_model(self) -> bool:
        """Whether any part of the model is a language model."""
        return self.encodes_prompts or self.encodes_text

    @property
    def head_has_text(self) -> bool:
        """Whether the head uses text embeddings of the items."""
        return self.encodes_prompts and head_class(self.config.head.name).needs_text(self.config.head)

    @property
    def needs_item_text(self) -> bool:
        """Whether training requires the texts of the items."""
        in_prompt = self.stage == "align" or (self.encodes_prompts and self.config.prompt.text_items > 0)
        return self.encodes_text or self.head_has_text or in_prompt

    @property
    def caches_catalog(self) -> bool:
        """Whether training caches the rows of all items: their tables are frozen and the catalog is small."""
        return self.encodes_prompts and self.num_items <= self.config.loss.max_cached_items

    @property
    def num_negatives(self) -> int:
        """Negatives per training step of the sampled softmax."""
        return self.config.text_encoder.num_negatives if self.encodes_text else self.config.loss.num_negatives

    @property
    def encoder_in_one_pass(self) -> bool:
        """Whether stage sbr encodes all prefixes of a session in one pass. A run resolves `auto` in its preflight."""
        return self.config.encoder.one_pass is True

    @property
    def max_prefixes_per_pass(self) -> int:
        """Most prefixes of a session that training encodes in one pass; 0 encodes each prefix separately."""
        if self.stage == "sbr" and self.encoder_in_one_pass:
            return self.config.encoder.max_clicks
        if self.stage == "behave" and self.config.prompt.one_pass:
            return self.config.prompt.max_nodes or sys.maxsize
        return self.config.text_encoder.max_clicks if self.encodes_text else 0

    @property
    def balances_clicks(self) -> bool:
        """Whether ranks train on about the same number of clicks, which decides the tokens of a language model.

        Stage align cuts batches by rows, because its contrastive groups are rows that follow each other.
        """
        return self.stage == "behave" or self.encodes_text

    def candidates(self, purpose: Purpose) -> CandidateSource:
        """Candidate items whose vectors a batch looks up, in addition to its nodes."""
        if purpose == "rank":
            return "none"
        if self.encodes_prompts:
            return "cached" if self.caches_catalog else "sampled"
        most = self.num_negatives if self.encodes_text else self.config.loss.full_softmax_max_items
        return "full" if self.num_items <= most else "sampled"

    @property
    def average(self) -> float:
        """Share of the steps, the last ones, over which training averages the weights; 0 does not."""
        return self.config.optimizer.average if self.stage == "sbr" else 0.0

    @property
    def looks_up_whole_tables(self) -> bool:
        """Whether training looks up each row of the item tables once, because a step needs the vectors of all items."""
        used = [self.num_embeddings.get(name, 0) for name in self.config.tables.side_features]
        # The lookup is as long as the largest table.
        return self.stage == "sbr" and self.candidates("train") == "full" and max(used, default=0) <= 2 * self.num_items

    def prompt_text_source(self, purpose: Purpose) -> PromptTextSource:
        """Source of the text at the placeholder {text} of the prompts."""
        if self.stage == "align" and purpose == "train":
            return "random_node"
        return "last_items" if self.encodes_prompts and self.config.prompt.text_items else "none"

    def check(self) -> None:
        """Checks that encoder and head exist and accept their settings.

        Raises:
            UserError: An encoder or head is unknown, or a setting of it is out of range.
        """
        encoder_class(self.config.encoder.name).check(self.config.encoder, self.config.tables.dim)
        if self.encodes_prompts:
            head_class(self.config.head.name).check(self.config.head)

    def build(
        self, language: LanguageParts | None = None, tables_device: torch.device | str = "cpu"
    ) -> SessionRecommender | LLMGR:
        """Builds the model; its initial weights depend only on the settings, seed included.

        Args:
            language: Parts of the language model; required if the model has one.
            tables_device: Device of the embedding tables; on `meta` the sharder allocates them.

        Raises:
            UserError: A setting is out of its range, or two settings conflict.
            ValueError: The model has a language model, and `language` is None.
        """
        if not self.has_language_model:
            return self._recommender(tables_device)
        if language is None:
            raise ValueError(f"stage {self.stage} needs a language model")
        if self.encodes_prompts:
            return self._llmgr(language, tables_device)
        return self._recommender(tables_device, self._text_encoder(language))

    def build_task(
        self,
        model: SessionRecommender | LLMGR,
        world_size: int = 1,
        loss_dtype: torch.dtype = torch.float32,
        side_features: Mapping[str, Jagged] | None = None,
    ) -> nn.Module:
        """Builds the training task of the stage: the model and its loss.

        Args:
            model: From `build`.
            world_size: Number of ranks, over which gradients are averaged.
            loss_dtype: Dtype of the scores in the ranking loss, see `ranking_loss`.
            side_features: Side features of the items, where the batches look up whole tables; see
                `Collator.with_table_rows`.

        Raises:
            TypeError: The model is not of this stage.
        """
        config = self.config
        if isinstance(model, LLMGR) != self.encodes_prompts:
            raise TypeError(f"stage {self.stage} does not train a {type(model).__name__}")
        if isinstance(model, SessionRecommender):
            if self.encodes_text:
                return LLMTextTask(model, world_size, loss_dtype)
            catalog = None
            if side_features is not None:
                names = [name for name in model.item_tables.feature_names if name in side_features]
                catalog = WholeCatalog(self.num_items, {name: side_features[name] for name in names})
            return SbrTask(model, world_size, loss_dtype, self.encoder_in_one_pass, catalog)
        if self.stage == "align":
            return AlignTask(model, config.contrast.weight, world_size=world_size, loss_dtype=loss_dtype)
        return BehaveTask(model, world_size, config.prompt.one_pass, loss_dtype)

    def _recommender(
        self, tables_device: torch.device | str, text_encoder: TextSequenceEncoder | None = None
    ) -> SessionRecommender:
        config, device = self.config, torch.device(tables_device)
        features: list[str] = [name for name in config.tables.side_features if name in self.num_embeddings]
        sizes = {name: self.num_embeddings[name] for name in features}
        with _seeded(config.seed):
            # Before the tables, which draw random numbers unless they are on meta.
            encoder = build_encoder(config.encoder, config.tables.dim)
            return SessionRecommender(
                ItemTables(self.num_items, sizes, config.tables.dim, device),
                encoder,
                config.encoder.score,
                config.encoder.temperature,
                text_tables(self.num_items, text_encoder.dim, device) if text_encoder else None,
                text_encoder,
            )

    def _text_encoder(self, language: LanguageParts) -> TextSequenceEncoder:
        config, decoder = self.config, language.decoder
        width = decoder.get_input_embeddings().weight.shape[1]
        if config.text_encoder.dim > width:
            raise UserError(
                f"setting text_encoder.dim is {config.text_encoder.dim}, but {config.llm.name_or_path} has {width} "
                f"columns; give {width} at most"
            )
        if config.llm.recompute:
            decoder.activation_checkpointing_enable({"use_reentrant": False})
        settings = config.text_encoder
        encoder = TextSequenceEncoder(
            decoder, language.item_tokens, settings.dim, settings.max_clicks, settings.dropout
        )
        return encoder.to(decoder.device)

    def _llmgr(self, language: LanguageParts, tables_device: torch.device | str) -> LLMGR:
        from llmgr_rec.modules.language_model import LoraLanguageModel, mean_embedding_norm

        config, decoder = self.config, language.decoder
        recommender = self._recommender(tables_device)
        norm = language.embedding_norm
        norm = mean_embedding_norm(decoder) if norm is None else norm
        with _seeded(config.seed):
            llm = config.llm
            language_model = LoraLanguageModel(
                decoder, llm.lora_rank, llm.lora_alpha, llm.lora_dropout, recompute=llm.recompute
            )
            d1, d2 = config.tables.dim, language_model.hidden_size
            head = build_head(config.head, d1, d2, self.num_items)
            return LLMGR(
                recommender,
                ProjectionAdapter(d1, d2, norm),
                language_model,
                head,
                language.prompts,
                text_tables(self.num_items, d2, torch.device(tables_device)) if self.head_has_text else None,
                config.prompt.node_source,
                config.prompt.node_order,
                config.prompt.max_nodes,
                llm.micro_batches,
            )


def build_recommender(
    config: Config, num_items: int, num_embeddings: Mapping[str, int], tables_device: torch.device | str = "cpu"
) -> SessionRecommender:
    """Builds a session recommender; its initial weights depend only on the settings, seed included.

    Args:
        config: All settings.
        num_items: Size V of the catalog.
        num_embeddings: Vocabulary size of each side feature of the catalog.
        tables_device: Device of the item tables; on `meta` the sharder allocates them.

    Raises:
        UserError: A setting is out of its range, or two settings conflict.
    """
    recommender = ModelSpec("sbr", config, num_items, num_embeddings).build(tables_device=tables_device)
    assert isinstance(recommender, SessionRecommender)
    return recommender


def query_width(model: SessionRecommender | LLMGR) -> int:
    """Number of columns of a model's queries and item vectors in ranking.

    Args:
        model: The model, on any device, including `meta`.
    """
    if isinstance(model, LLMGR):
        return model.head.head_columns + (query_width(model.recommender) if model.head.residual else 0)
    return model.item_tables.dim + (model.text_encoder.dim if model.text_encoder else 0)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch inside the block, so that initial weights are equal on all ranks; restores its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
