"""Estimate of the memory of a rank over a whole run, and of the disk that a checkpoint takes, in bytes.

`memory_plan` gives what the model takes exactly. The rest, such as activations and the items' columns, is estimated
from settings and sizes.
"""

from dataclasses import dataclass
from typing import Self

from llmgr_rec.baselines.knn_smoothing import K_NEIGHBORS
from llmgr_rec.baselines.reranker import DEPTH, FEATURES, TERM_FEATURES
from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.data.dataset import Manifest
from llmgr_rec.distributed.item_vectors import BLOCK_ITEMS, keeps_vectors
from llmgr_rec.modules.model_spec import ModelSpec
from llmgr_rec.storage.checkpoint_state import BLOCK_VALUES
from llmgr_rec.storage.embedding_model import EmbeddingModel
from llmgr_rec.training.id_row_smoothing import STRIP_BYTES
from llmgr_rec.training.memory_plan import FROZEN, CatalogSizes, Ranks, StagePlan

_MIB = 1 << 20
_FLOAT_BYTES = _INDEX_BYTES = 4
_LONG_BYTES = 8
# Imported libraries and the reader, and freed memory that the allocator keeps for the next step.
_PROGRAM, _PROGRAM_WITH_LANGUAGE_MODEL, _KEPT = 430 * _MIB, 620 * _MIB, 128 * _MIB
# Buffers and threads of the exchanges between ranks.
_EXCHANGES = 90 * _MIB
# Ids of an item in each side feature, where there is no data set: categories, brands, words.
_IDS_PER_ITEM = {"category": 3, "brand": 1, "word": 8}
# Bytes of an item id and its offset, where there is no data set; and what checking the items takes beside them: a hash
# and a batch of rows.
_ID_BYTES, _CHECK_BYTES, _BATCH_BYTES = 16, 24, 16 * _MIB
# A similarity and its index; both are twice in memory while they are sent to the ranks of their columns.
_ENTRY_BYTES = _FLOAT_BYTES + _INDEX_BYTES
_COPIES_WHILE_COMPUTED = 2
# LightGBM, copies of the lists that it is fitted to, and the share of sessions with their target in a list.
_LIGHTGBM, _COPIES_OF_LISTS, _LISTED_TARGETS = 30 * _MIB, 2, 0.5
# A block of a table that is written, and as a file.
_COPIES_OF_BLOCKS = 2
# Copies of item rows in a step: looked up, item vectors, gradients of both.
_COPIES_OF_ROWS = 4
# Tensors of the encoder that are kept for the backward pass, of [clicks, dim] each.
_ENCODER_TENSORS = 24
# Bytes of activations of a decoder layer per token and hidden column, in 16 bits without recomputation (Korthikanti et
# al. 2022, arXiv 2205.05198, without the attention matrix, which the fused kernel does not keep).
_DECODER_BYTES = 34
# Tokens of a prompt beside those of its nodes, and clicks of a session, where they are not known.
_PROMPT_TOKENS, _CLICKS = 40, 10
# Values of a trained dense parameter in a checkpoint: itself and two moments of AdamW.
_SAVED_VALUES = 3


@dataclass(frozen=True)
class Reading:
    """The training sessions of a run.

    Args:
        num_targets: Number of targets; None if it is not known.
        num_sessions: Number of sessions; None if it is not known.
        num_validated: Number of validation sessions; None if it is not known.
    """

    num_targets: int | None = None
    num_sessions: int | None = None
    num_validated: int | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The training sessions of a prepared data set."""
        return cls(manifest.num_examples["train"], manifest.num_sessions["train"], manifest.num_examples["valid"])

    @property
    def clicks(self) -> float:
        """Mean number of targets of a session."""
        return self.num_targets / self.num_sessions if self.num_targets and self.num_sessions else _CLICKS

    def examples(self, spec: ModelSpec) -> int | None:
        """Examples of an epoch of a stage, as `batch_size` counts them; None if not known."""
        if self.num_targets is None or not _counts_sessions(spec):
            return self.num_targets
        return self.num_sessions or round(self.num_targets / _CLICKS)


@dataclass(frozen=True)
class RankMemory:
    """Memory of the rank that needs most in a stage, by what takes it.

    Args:
        preflight: Held while the catalog is read and checked, before the stage is built.
        always: Held during the whole stage.
        training: Held in a step, in addition.
        saving: Held while a checkpoint is written or read, in addition.
        selection: Held while smoothing and blend weights are selected after the last step, in addition.
        checkpoint: Disk space of a checkpoint, of all ranks together.
    """

    preflight: dict[str, int]
    always: dict[str, int]
    training: dict[str, int]
    saving: dict[str, int]
    selection: dict[str, int]
    checkpoint: int

    @property
    def phases(self) -> dict[str, int]:
        """Memory of each phase."""
        always = sum(self.always.values())
        return {
            "preflight": sum(self.preflight.values()),
            "training": always + sum(self.training.values()),
            "saving": always + sum(self.saving.values()),
            "selection": always + sum(self.selection.values()),
        }

    @property
    def peak(self) -> int:
        """Memory of the phase that takes most."""
        return max(self.phases.values())


def estimate_memory(plan: StagePlan, sizes: CatalogSizes, ranks: Ranks, reading: Reading) -> RankMemory:
    """Estimates the memory of the rank that needs most.

    Args:
        plan: Plan of the stage.
        sizes: The catalog.
        ranks: Ranks of the run.
        reading: The training sessions.
    """
    program = _PROGRAM_WITH_LANGUAGE_MODEL if plan.spec.has_language_model else _PROGRAM
    columns = sizes.catalog_bytes or _catalog_bytes(sizes)
    preflight = {
        "program": program,
        "columns of the catalog": columns,
        "ids of the catalog": sizes.id_bytes or _ID_BYTES * sizes.num_items,
        "checking the catalog": _CHECK_BYTES * sizes.num_items + _BATCH_BYTES,
    }
    always = {
        "program": program + _KEPT + (_EXCHANGES if ranks.size > 1 else 0),
        "tables and their optimizer": max(plan.bytes_per_rank.values(), default=0),
        "dense parameters, gradients and AdamW": plan.dense_bytes,
        "cached item vectors": plan.cached_bytes,
        "mean of the weights": plan.averaged_bytes,
        "columns of the catalog": columns,
        "sampler of negatives": _sampler_bytes(plan),
    }
    selection = max(_selection_phases(plan, ranks, reading), key=lambda parts: sum(parts.values()))
    saving = {
        "blocks of tables": _COPIES_OF_BLOCKS * min(BLOCK_VALUES * _FLOAT_BYTES, always["tables and their optimizer"])
    }
    training = {"activations": _activation_bytes(plan, ranks, reading.clicks)}
    return RankMemory(preflight, always, training, saving, selection, _checkpoint_bytes(plan))


def _selection_phases(plan: StagePlan, ranks: Ranks, reading: Reading) -> list[dict[str, int]]:
    """What is held while neighbors are computed, while candidates are tried, and while the best one is applied."""
    config, num_items = plan.spec.config, plan.spec.num_items
    held = -(-num_items // ranks.size)
    entries = [round(_neighbors_per_item(name, plan, reading) * held) for name in config.blend.scores]
    stored = [_ENTRY_BYTES * number for number in entries]
    vectors = {"item vectors for ranking": _vector_bytes(plan, ranks, held)}
    phases = [{"neighbors": sum(stored[:kind]) + _COPIES_WHILE_COMPUTED * stored[kind]} for kind in range(len(entries))]
    smoothing = {}
    if plan.spec.stage == "sbr" and any(config.tables.knn_smoothing):
        (ids,) = (table for table in plan.tables if table.footprint.table == ITEM_ID)
        shard = ids.footprint.weight_bytes // max(len(ids.bytes_per_rank), 1)
        nearest = held * min(K_NEIGHBORS, num_items) * _ENTRY_BYTES
        smoothing = {"smoothing of cold items": nearest + min(shard, max(STRIP_BYTES, 4 * _FLOAT_BYTES * num_items))}
        by_words = _ENTRY_BYTES * round(held * _neighbors_per_item("text_knn", plan, reading))
        phases.append({"neighbors": sum(stored) + _COPIES_WHILE_COMPUTED * by_words})
    if (embedding_model := EmbeddingModel.of(config)) is not None:
        phases.append({"neighbors": sum(stored), "embedding model": embedding_model.num_bytes})
    phases.append({"neighbors": sum(stored), **vectors, **smoothing})
    # The weighted ones share their indices with those that they are made of.
    weighted = sum(stored) + _FLOAT_BYTES * sum(entries) + (sum(stored) if len(entries) > 1 else 0)
    phases.append({"neighbors": weighted, **smoothing})
    if config.blend.reranker != "none":
        phases.append({"neighbors": weighted, **vectors, **smoothing, "re-ranker": _reranker_bytes(plan, reading)})
    return phases


def _reranker_bytes(plan: StagePlan, reading: Reading) -> int:
    """What the fit of a re-ranker holds: the lists of all validation sessions, and another copy while trees are fitted.

    Without a data set it has one validation session for each training session.
    """
    targets = reading.num_targets or 0
    sessions = reading.num_validated
    if sessions is None:
        sessions = reading.num_sessions or round(targets / _CLICKS)
    features = len(FEATURES) + len(TERM_FEATURES) * len(plan.spec.config.blend.scores)
    # Of an item of a list: its index, its score, its features, and whether it is the target.
    item = _LONG_BYTES + _FLOAT_BYTES * (1 + features) + 1
    return _LIGHTGBM + round(_COPIES_OF_LISTS * _LISTED_TARGETS * sessions) * DEPTH * item


def _vector_bytes(plan: StagePlan, ranks: Ranks, held: int) -> int:
    """Item vectors of a rank, or those of a block of its items."""
    if not keeps_vectors(plan.spec.num_items, ranks.size, plan.query_width):
        return _FLOAT_BYTES * plan.query_width * min(BLOCK_ITEMS, held)
    # On a CPU many sessions are ranked by integers of a byte first.
    code_bytes = 1 if ranks.device_type == "cpu" else 0
    return (_FLOAT_BYTES + code_bytes) * plan.query_width * held


def _neighbors_per_item(name: str, plan: StagePlan, reading: Reading) -> float:
    """Largest mean number of neighbors of an item."""
    num_items = plan.spec.num_items
    largest = min(plan.spec.config.blend.k_neighbors, num_items - 1)
    if name != "item_knn" or reading.num_targets is None:
        return largest
    # Only items with clicks have any.
    clicks = reading.num_targets + (reading.num_sessions or 0)
    return largest * min(clicks / num_items, 1.0)


def _counts_sessions(spec: ModelSpec) -> bool:
    """Whether an example is a whole session, which has a target at every click."""
    return spec.stage != "sbr" and bool(spec.max_prefixes_per_pass)


def _catalog_bytes(sizes: CatalogSizes) -> int:
    """Training clicks and side features of all items."""
    features = sum(_INDEX_BYTES * (1 + _IDS_PER_ITEM[name]) for name in sizes.num_embeddings)
    return sizes.num_items * (_LONG_BYTES + features)


def _sampler_bytes(plan: StagePlan) -> int:
    """The items by popularity, and the rank of each item."""
    return 2 * _INDEX_BYTES * plan.spec.num_items if plan.spec.candidates("train") == "sampled" else 0


def _activation_bytes(plan: StagePlan, ranks: Ranks, clicks: float) -> int:
    spec, config = plan.spec, plan.spec.config
    sessions = -(-config.stage(spec.stage).batch_size // ranks.size)
    shown = min(clicks, config.encoder.max_clicks)
    targets = round(sessions * shown) if _counts_sessions(spec) else sessions
    candidates = spec.num_items
    if spec.candidates("train") == "sampled":
        candidates = min(spec.num_negatives + targets * ranks.size, spec.num_items)
    loss = 2 * targets * candidates * _FLOAT_BYTES + _COPIES_OF_ROWS * candidates * config.tables.dim * _FLOAT_BYTES
    encoder = round(_ENCODER_TENSORS * sessions * shown) * config.tables.dim * _FLOAT_BYTES
    if not spec.has_language_model:
        return loss + encoder
    tokens = sessions * (_PROMPT_TOKENS + round(shown))
    if spec.encodes_prompts:
        tokens = -(-tokens // config.llm.micro_batches)
    layers = 2 if config.llm.recompute else config.llm.num_layers
    return loss + encoder + tokens * plan.hidden_size * layers * _DECODER_BYTES * _FLOAT_BYTES // 2


def _checkpoint_bytes(plan: StagePlan) -> int:
    tables = sum(table.footprint.weight_bytes + table.footprint.state_bytes for table in plan.tables)
    if plan.spec.average:
        tables += _FLOAT_BYTES * sum(table.footprint.rows * table.footprint.dim for table in plan.tables)
    return tables + _SAVED_VALUES * _FLOAT_BYTES * sum(
        number for group, number in plan.parameters.items() if group != FROZEN
    )
