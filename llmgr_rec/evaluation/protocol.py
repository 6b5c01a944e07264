"""Evaluation protocol: every session of a split ranks the whole catalog, on any number of ranks.

Shapes: B sessions of this rank, Q columns of queries, K items of a ranked list.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmgr_rec.baselines.blend import clicks_of
from llmgr_rec.baselines.knn import Baseline
from llmgr_rec.cli import progress
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.data.reader import SamplingOrder, SessionReader
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.ranking import RankingModel
from llmgr_rec.evaluation.beyond_accuracy import BeyondAccuracy
from llmgr_rec.evaluation.exclusion import RankingRule, ranked_by, ranking_rule, seen_items
from llmgr_rec.evaluation.metrics import RankingMetrics
from llmgr_rec.evaluation.rank_collector import RankCollector
from llmgr_rec.evaluation.results import BEYOND_ACCURACY, CUTOFFS, K

T = TypeVar("T")

# Rows per batch of a baseline.
_READ_ROWS = 8192


@dataclass(frozen=True)
class Measures:
    """What is measured of the ranked lists of a split, beside the accuracy.

    Args:
        cutoffs: Cutoffs of the accuracy, 20 among them.
        ranks: Takes the target rank of each session.
        beyond_accuracy: Takes the lists.
    """

    cutoffs: Sequence[int] = CUTOFFS
    ranks: RankCollector | None = None
    beyond_accuracy: BeyondAccuracy | None = None


@torch.no_grad()  # not inference_mode, which breaks fbgemm's CPU lookup and gloo's collectives
def evaluate_model(
    ranking: RankingModel,
    dataset: Dataset,
    split: str,
    world: World,
    train_count_V: Tensor,
    rule: RankingRule | None = None,
    measures: Measures | None = None,
) -> dict[str, Any]:
    """Ranks the whole catalog for every session of a split and computes the ranking metrics.

    Args:
        ranking: The model; its training mode is restored afterwards.
        dataset: Prepared sessions.
        split: train, valid or test.
        world: Ranks; all call together, and all return the same result.
        train_count_V: Training clicks of each item.
        rule: What a ranking shows and excludes of a session; None takes what the data set records.
        measures: What else is measured; None measures the accuracy at the usual cutoffs.

    Returns:
        The result of `RankingMetrics.compute`, and of `BeyondAccuracy.compute` if that is measured.
    """
    measures = measures or Measures()
    lists = ranked_lists(ranking, dataset, split, world, rule, max(measures.cutoffs))
    return _measure(lists, train_count_V.to(world.device), world, measures)


def _measure(
    lists: Iterator[tuple[Tensor, Tensor, SessionBatch]] | Iterator[tuple[Tensor, Tensor, RawSessions]],
    train_count_V: Tensor,
    world: World,
    measures: Measures,
) -> dict[str, Any]:
    metrics = RankingMetrics(train_count_V, measures.cutoffs)
    for ids_BK, scores_BK, batch in lists:
        ranks_B = metrics.update(ids_BK, batch.targets_B, batch.weights_B)
        if measures.ranks is not None:
            measures.ranks.add(ranks_B, batch.weights_B)
        if measures.beyond_accuracy is not None:
            measures.beyond_accuracy.update(ids_BK, scores_BK, batch.targets_B, batch.weights_B)
    result = metrics.compute(lambda counts: sum_over_ranks(counts, world))
    if measures.beyond_accuracy is not None:
        result[BEYOND_ACCURACY] = measures.beyond_accuracy.compute(lambda sums: sum_over_ranks(sums, world))
    return result


@torch.no_grad()
def ranked_lists(
    ranking: RankingModel,
    dataset: Dataset,
    split: str,
    world: World,
    rule: RankingRule | None = None,
    depth: int = K,
) -> Iterator[tuple[Tensor, Tensor, SessionBatch]]:
    """Ranks the whole catalog for this rank's sessions of a split; see `evaluate_model` for the arguments.

    Args:
        ranking: The model.
        dataset: Prepared sessions.
        split: train, valid or test.
        world: Ranks; all call together.
        rule: As in `evaluate_model`.
        depth: Length of the lists.

    Yields:
        Item indices, int64 [B, depth], best first; -1 pads the lists of a smaller catalog. Their scores. And the batch
        of sessions, in the order of the split; sessions of weight 0 are padding.
    """
    if rule is not None and rule.domains == "all":
        ranking = replace(ranking, domains=None)
    with evaluation_mode(ranking.model):
        ranker = ranking.ranker(world)
        ranking = ranking.with_query_encoder(ranker)
        batches = evaluation_batches(ranking, dataset, split, world, f"evaluate {split}", rule)
        for group in groups_of_batches(batches, ranker.sessions_at_once, ranking.batch_size):
            clicks = group.clicks if ranker.needs_clicks else None
            ids_BK, scores_BK = ranker.rank(group.queries_BQ, depth, group.exclude, clicks)
            sizes = [len(sessions.queries_BQ) for sessions in group.batches]
            for sessions, *lists in zip(group.batches, ids_BK.split(sizes), scores_BK.split(sizes), strict=True):
                yield lists[0], lists[1], sessions.batch


@torch.no_grad()
def evaluate_baseline(
    baseline: Baseline,
    dataset: Dataset,
    split: str,
    catalog: Catalog,
    world: World,
    rule: RankingRule | None = None,
    measures: Measures | None = None,
) -> dict[str, Any]:
    """`evaluate_model` for a baseline.

    Args:
        baseline: From `build_baseline`.
        dataset: Prepared sessions.
        split: train, valid or test.
        catalog: The data set's items.
        world: Ranks; all call together, and all return the same result.
        rule: As in `evaluate_model`.
        measures: As in `evaluate_model`.

    Returns:
        As `evaluate_model`.
    """
    measures = measures or Measures()
    lists = baseline_lists(baseline, dataset, split, world, rule, max(measures.cutoffs))
    return _measure(lists, catalog.train_count_V, world, measures)


def baseline_lists(
    baseline: Baseline, dataset: Dataset, split: str, world: World, rule: RankingRule | None = None, depth: int = K
) -> Iterator[tuple[Tensor, Tensor, RawSessions]]:
    """`ranked_lists` for a baseline; see `evaluate_baseline` for the arguments."""
    rule = rule or ranking_rule(dataset.manifest)
    reader = split_reader(dataset, split, _READ_ROWS, lambda raw: raw.newest(rule.max_length))
    for raw in batches_of_rank(reader, world, f"evaluate {split}"):
        ids_BK, scores_BK = ranked_by(baseline, raw, depth, rule.excludes_seen)
        yield torch.from_numpy(ids_BK), torch.from_numpy(scores_BK), raw


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Sets a model to eval mode and restores its training mode afterwards."""
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
    """A reader of a split in the order of its files, with prefix augmentation if the split has it.

    Args:
        dataset: Prepared sessions.
        split: train, valid or test.
        batch_size: Sessions per batch.
        collate: Converts raw sessions to a batch.
    """
    return SessionReader(
        dataset.parts(split),
        num_items=dataset.manifest.num_items,
        collate=collate,
        order=SamplingOrder(batch_size, augment_prefixes=split in dataset.manifest.prefix_augmentation),
    )


@dataclass(frozen=True)
class QueryBatch:
    """A batch of sessions and the queries of a model.

    Args:
        batch: The sessions, on the device of the model.
        queries_BQ: Their queries.
        exclude: Items to exclude from the ranking, one row per session; None excludes none.
    """

    batch: SessionBatch
    queries_BQ: Tensor
    exclude: Jagged | None


@dataclass(frozen=True)
class GroupOfBatches:
    """Batches that are ranked at once.

    Args:
        batches: One or more.
    """

    batches: list[QueryBatch]

    @property
    def queries_BQ(self) -> Tensor:
        """The queries of all sessions."""
        return torch.cat([sessions.queries_BQ for sessions in self.batches])

    @property
    def targets_B(self) -> Tensor:
        """Their targets."""
        return torch.cat([sessions.batch.targets_B for sessions in self.batches])

    @property
    def weights_B(self) -> Tensor:
        """Their weights."""
        return torch.cat([sessions.batch.weights_B for sessions in self.batches])

    @property
    def exclude(self) -> Jagged | None:
        """Items to exclude from their rankings; None excludes none."""
        lists = [sessions.exclude for sessions in self.batches if sessions.exclude is not None]
        return Jagged.stack(lists) if lists else None

    @property
    def clicks(self) -> Jagged:
        """Their clicks, oldest first."""
        return Jagged.stack([clicks_of(sessions.batch) for sessions in self.batches])


def groups_of_batches(
    batches: Iterable[QueryBatch], sessions_at_once: int, batch_size: int
) -> Iterator[GroupOfBatches]:
    """Puts batches together that are ranked at once, the same numbers of them on each rank.

    Args:
        batches: From `evaluation_batches`.
        sessions_at_once: Sessions of a group, to within a batch; see `CatalogRanker`.
        batch_size: Sessions of a batch.
    """
    batches, most = iter(batches), max(sessions_at_once // batch_size, 1)
    while group := list(islice(batches, most)):
        yield GroupOfBatches(group)


def evaluation_batches(
    ranking: RankingModel,
    dataset: Dataset,
    split: str,
    world: World,
    description: str,
    rule: RankingRule | None = None,
) -> Iterator[QueryBatch]:
    """Batches of this rank's sessions of a split, with queries and excluded items.

    Args:
        ranking: The model, in eval mode.
        dataset: Prepared sessions.
        split: train, valid or test.
        world: Ranks; all call together, and all have to consume every batch.
        description: Title of the progress bar.
        rule: As in `evaluate_model`.
    """
    rule = rule or ranking_rule(dataset.manifest)
    reader = split_reader(dataset, split, ranking.batch_size, lambda raw: ranking.collate(raw.newest(rule.max_length)))
    for loaded in batches_of_rank(reader, world, description):
        batch = loaded.to(world.device)
        yield QueryBatch(batch, ranking.queries(batch), seen_items(batch) if rule.excludes_seen else None)


def batches_of_rank(reader: SessionReader[T], world: World, description: str) -> Iterator[T]:
    """Batches of this rank, assigned round-robin, the same number on each rank.

    A batch contains the same sessions for any number of ranks. Otherwise metrics would depend on it: rounding depends
    on the shape of a batch, and in bfloat16 it changes the order of items with nearly equal scores.
    A rank without a batch in the last round repeats one with weights 0.

    Args:
        reader: Reads the whole split.
        world: Ranks.
        description: Title of the progress bar.
    """
    steps, bar = reader.steps_per_epoch, progress(reader.num_examples, description, "session")
    for first in range(0, steps, world.size):
        step = first + world.rank
        batch: Any = reader.collated(0, min(step, steps - 1))
        yield batch if step < steps else replace(batch, weights_B=torch.zeros_like(batch.weights_B))
        bar.update(min(world.size * reader.order.batch_size, reader.num_examples - first * reader.order.batch_size))
    bar.close()


def identity(raw: RawSessions) -> RawSessions:
    """Collate function of readers whose sessions need no graphs."""
    return raw
