"""How a model is judged: every session of a split against the whole catalogue, whatever the number of ranks.

Shapes: B sessions of this rank, Q columns of queries, K places of a ranked list.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmgr_rec.baselines.blend import Blend, clicks_of
from llmgr_rec.baselines.knn import Baseline
from llmgr_rec.cli import progress
from llmgr_rec.config import Config
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalogue import Catalogue
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.reader import SamplingOrder, SessionReader
from llmgr_rec.distributed.assembly import make_collator
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import CatalogueRanker
from llmgr_rec.distributed.reduce import sum_over_ranks
from llmgr_rec.evaluation.clicked import clicked_items, leaves_out_clicked, ranked_by
from llmgr_rec.evaluation.metrics import RankingMetrics
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender

T = TypeVar("T")

# Rows read at a time where no model has to hold them.
_READ_ROWS = 8192


@torch.no_grad()  # not inference_mode, which breaks fbgemm's CPU lookup and gloo's collectives
def evaluate_model(
    model: SessionRecommender | LLMGR,
    dataset: Dataset,
    split: str,
    config: Config,
    world: World,
    catalogue: Catalogue | None = None,
    prior: Blend | None = None,
) -> dict[str, Any]:
    """Ranks the whole catalogue for every session of a split and counts where the targets stand.

    What a session has clicked is left out of its ranking where the data set's training sessions repeat no click.

    Args:
        model: Sharded or not; it is in its former mode again afterwards.
        dataset: Prepared sessions.
        split: train, valid or test.
        config: All settings.
        world: Ranks; all call together, and all get the result.
        catalogue: The data set's items, where they are at hand.
        prior: What neighbours add to the model's scores.

    Returns:
        What `RankingMetrics.compute` gives.
    """
    catalogue = catalogue or Catalogue.load(dataset.path)
    metrics = RankingMetrics(catalogue.train_count_V.to(world.device))
    for ids_BK, batch in ranked_lists(model, dataset, split, config, world, catalogue, prior):
        metrics.update(ids_BK, batch.targets_B, batch.weights_B)
    return metrics.compute(lambda counts: sum_over_ranks(counts, world))


@torch.no_grad()
def ranked_lists(
    model: SessionRecommender | LLMGR,
    dataset: Dataset,
    split: str,
    config: Config,
    world: World,
    catalogue: Catalogue,
    prior: Blend | None = None,
) -> Iterator[tuple[Tensor, SessionBatch]]:
    """Ranks the whole catalogue for this rank's sessions of a split; see `evaluate_model` for the arguments.

    Yields:
        Item indices, int64 [B, K], best first, K = `RankingMetrics.depth`; -1 where a catalogue has fewer items. And
        the batch of sessions, in the order of the split; rows of weight 0 only fill up a rank.
    """
    collate = make_collator(config, catalogue, "rank", language=isinstance(model, LLMGR))
    with evaluation_mode(model):
        ranker = CatalogueRanker(model, collate, world, prior)
        for asked in asked_of_rank(model, collate, dataset, split, config, world, f"evaluate {split}"):
            clicks = None if prior is None else clicks_of(asked.batch)
            ids_BK, _ = ranker.rank(asked.queries_BQ, RankingMetrics.depth, asked.exclude, clicks)
            yield ids_BK, asked.batch


def evaluate_baseline(
    baseline: Baseline, dataset: Dataset, split: str, catalogue: Catalogue, world: World
) -> dict[str, Any]:
    """The same for a recommender without weights.

    Args:
        baseline: From `build_baseline`.
        dataset: Prepared sessions.
        split: train, valid or test.
        catalogue: The data set's items.
        world: Ranks; all call together, and all get the result.
    """
    metrics = RankingMetrics(catalogue.train_count_V)
    for ids_BK, raw in baseline_lists(baseline, dataset, split, world):
        metrics.update(ids_BK, raw.targets_B, raw.weights_B)
    return metrics.compute(lambda counts: sum_over_ranks(counts, world))


def baseline_lists(
    baseline: Baseline, dataset: Dataset, split: str, world: World
) -> Iterator[tuple[Tensor, RawSessions]]:
    """As `ranked_lists`, for a recommender without weights; see `evaluate_baseline` for the arguments."""
    reader = split_reader(dataset, split, _READ_ROWS, as_it_is)
    leave_out = leaves_out_clicked(dataset)
    for raw in batches_of_rank(reader, world, f"evaluate {split}"):
        yield torch.from_numpy(ranked_by(baseline, raw, RankingMetrics.depth, leave_out)), raw


def session_queries(model: SessionRecommender | LLMGR, batch: SessionBatch) -> Tensor:
    """Query of each session, [B, Q], as the model answers it outside of training."""
    if isinstance(model, SessionRecommender):
        return model.queries(batch)
    return model(batch)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off and, afterwards, back to what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def split_reader(
    dataset: Dataset,
    split: str,
    batch_size: int,
    collate: Callable[[RawSessions], T],
) -> SessionReader[T]:
    """Reads a split in the order of its files, with the prefixes that belong to it.

    Args:
        dataset: Prepared sessions.
        split: train, valid or test.
        batch_size: Sessions of a batch.
        collate: Makes a batch of the raw sessions.
    """
    return SessionReader(
        dataset.parts(split),
        num_items=dataset.manifest.num_items,
        collate=collate,
        order=SamplingOrder(batch_size, augment_prefixes=split in dataset.manifest.prefix_augmentation),
    )


@dataclass(frozen=True)
class Asked:
    """Sessions of a split that a model is to rank items for.

    Args:
        batch: The sessions, where the model computes.
        queries_BQ: Its queries.
        exclude: Items that a session must not get; None leaves nothing out.
    """

    batch: SessionBatch
    queries_BQ: Tensor
    exclude: Jagged | None


def asked_of_rank(
    model: SessionRecommender | LLMGR,
    collate: Collator,
    dataset: Dataset,
    split: str,
    config: Config,
    world: World,
    description: str,
) -> Iterator[Asked]:
    """This rank's sessions of a split, by the rules that every model is judged by.

    Args:
        model: In eval mode.
        collate: Makes batches to rank for.
        dataset: Prepared sessions.
        split: train, valid or test.
        config: All settings.
        world: Ranks; all call together, and take every batch.
        description: Heads the progress bar.
    """
    leave_out = leaves_out_clicked(dataset)
    reader = split_reader(dataset, split, config.runtime.eval_batch_size, collate)
    for loaded in batches_of_rank(reader, world, description):
        batch = loaded.to(world.device)
        yield Asked(batch, session_queries(model, batch), clicked_items(batch) if leave_out else None)


def batches_of_rank(reader: SessionReader[T], world: World, description: str) -> Iterator[T]:
    """This rank's batches: whole ones dealt out in turn, as many to each rank.

    So a session shares its batch with the same others at any number of ranks: rounding depends on a batch's shape, and
    a language model in bfloat16 makes it large enough to change the order of nearly equal items. A rank without a batch
    in the last round goes along with one that counts nothing.
    """
    steps, bar = reader.steps_per_epoch, progress(reader.num_examples, description, "session")
    for first in range(0, steps, world.size):
        step = first + world.rank
        batch: Any = reader.collated(0, min(step, steps - 1))
        yield batch if step < steps else replace(batch, weights_B=torch.zeros_like(batch.weights_B))
        bar.update(min(world.size * reader.order.batch_size, reader.num_examples - first * reader.order.batch_size))
    bar.close()


def as_it_is(raw: RawSessions) -> RawSessions:
    """Collates nothing: for readers of sessions that need no graphs."""
    return raw
