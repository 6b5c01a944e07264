"""The baselines by name, and how one is made from a data set.

Shapes: L clicks, B sessions, S training sessions, V items.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from scipy import sparse

from llmgr_rec.baselines.knn import Baseline, ItemKNN, ItemNeighbors, Popularity, SessionKNN, session_matrix
from llmgr_rec.baselines.text_knn import TEXT_FIELDS, TextKNN, has_words, texts_to_compare
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.reader import SamplingOrder, SessionReader
from llmgr_rec.errors import UserError
from llmgr_rec.registry import resolve

logger = logging.getLogger(__name__)

# Makes a baseline from the training split and the catalog; the number bounds the neighbors kept of each item, None
# leaves that to the baseline.
BaselineBuilder = Callable[[Dataset, Catalog, int | None], Baseline]

# Rows read at a time.
_READ_ROWS = 8192


def training_matrix(dataset: Dataset, num_items: int) -> sparse.csr_array:
    """The training sessions as a sparse matrix, [S, V]; see `session_matrix`.

    Each row is read once, with its target: prefixes of a session are no further evidence.

    Args:
        dataset: Prepared sessions.
        num_items: Items V of the catalog.
    """
    rows = SessionReader(
        dataset.parts("train"), num_items=num_items, collate=_with_target, order=SamplingOrder(_READ_ROWS)
    )
    return session_matrix(rows.batches(0), num_items)


def _popularity(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    return Popularity(catalog.train_count_V.numpy())


def _item_knn(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    return ItemKNN(training_matrix(dataset, catalog.num_items), k_neighbors=k_neighbors or 0)


def _session_knn(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    # Its neighbors are sessions, and `k_neighbors` counts those of items.
    return SessionKNN(training_matrix(dataset, catalog.num_items))


def _text_knn(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    texts = texts_to_compare(catalog)
    return TextKNN(texts) if k_neighbors is None else TextKNN(texts, k_neighbors=k_neighbors)


BASELINES: dict[str, BaselineBuilder] = {
    "popularity": _popularity,
    "item_knn": _item_knn,
    "session_knn": _session_knn,
    "text_knn": _text_knn,
}
# Those that are matrices of item similarities, which a bundle can carry.
BLENDED = ("item_knn", "text_knn")
# Evaluated beside every model unless others are asked for: session-kNN is slow on long logs, and not every data set
# has text.
DEFAULT_BASELINES = ("popularity", "item_knn")


def baseline_builder(name: str, what: str = "baseline") -> BaselineBuilder:
    """The builder that a name stands for.

    Args:
        name: Key of `BASELINES`, or the import path of a function or class that is called like those in it.
        what: Where the name stands, for messages.

    Raises:
        UserError: There is no such baseline.
    """
    builder = resolve(name, BASELINES, what)
    if not callable(builder):
        raise UserError(f"{what} is {name}, which cannot be called; give a function or class of (dataset, catalog, k)")
    return builder


def check_blended(names: Iterable[str]) -> None:
    """Refuses baselines that a bundle cannot carry.

    Args:
        names: Of `BLENDED`, or import paths. What a function behind a path makes is seen when it is called only.

    Raises:
        UserError: There is no such baseline, or it has no matrix of item similarities.
    """
    for name in names:
        if name in BLENDED:
            continue
        builder = baseline_builder(name, "setting blend.neighbors")
        if name in BASELINES or (isinstance(builder, type) and not issubclass(builder, ItemNeighbors)):
            raise UserError(
                f"setting blend.neighbors names {name}, which has no matrix of item similarities; name "
                f"{', '.join(BLENDED)} or a baseline derived from llmgr_rec.baselines.knn.ItemNeighbors"
            )


def build_baseline(name: str, dataset: Dataset, catalog: Catalog, k_neighbors: int | None = None) -> Baseline:
    """Makes a baseline from the training split, or from the items' text, alone.

    Args:
        name: Key of `BASELINES` or an import path; see `baseline_builder`.
        dataset: Prepared sessions.
        catalog: Their items.
        k_neighbors: Most similar items kept of each item by item_knn and text_knn; None takes their defaults.

    Raises:
        UserError: There is no such baseline, or it needs text and no item has any.
    """
    baseline = baseline_builder(name)(dataset, catalog, k_neighbors)
    if not isinstance(baseline, Baseline):
        raise UserError(
            f"baseline {name} made a {type(baseline).__name__} without a method rank; see baselines.Baseline"
        )
    return baseline


def build_neighbors(name: str, dataset: Dataset, catalog: Catalog, k_neighbors: int | None = None) -> Baseline:
    """Makes a baseline to blend with a model; text_knn adds nothing, and a warning says so, where no item has a word.

    One set of settings thus serves logs without text as well as shops; `build_baseline`, whose lists would be empty,
    refuses.

    Args:
        name: As in `build_baseline`.
        dataset: Prepared sessions.
        catalog: Their items.
        k_neighbors: As in `build_baseline`.
    """
    if name == "text_knn" and not has_words(texts := catalog.texts(list(TEXT_FIELDS), required=False)):
        logger.warning("%s: no item has a word in %s, so text_knn adds nothing", catalog.file, ", ".join(TEXT_FIELDS))
        return TextKNN(texts)
    return build_baseline(name, dataset, catalog, k_neighbors)


def check_baselines(names: Iterable[str], catalog: Catalog) -> None:
    """Refuses baselines that the data set has nothing for, before anything is trained or evaluated.

    Args:
        names: What is asked for, models among it.
        catalog: The items.

    Raises:
        UserError: One needs text, and no item has any.
    """
    if "text_knn" in names:
        texts_to_compare(catalog)


def _with_target(raw: RawSessions) -> tuple[Any, Any]:
    """Training sessions with their targets as last clicks: items_L and offsets_B1 as arrays."""
    sessions = len(raw.targets_B)
    offsets_B1 = raw.offsets_B1 + torch.arange(sessions + 1)
    items_L = torch.empty(int(offsets_B1[-1]), dtype=torch.int64)
    is_target_L = torch.zeros(len(items_L), dtype=torch.bool)
    is_target_L[offsets_B1[1:] - 1] = True
    items_L[is_target_L] = raw.targets_B
    items_L[~is_target_L] = raw.items_L
    return items_L.numpy(), offsets_B1.numpy()
