"""Registry of the baselines, and functions that build them from a data set.

Shapes: L clicks, B sessions, S training sessions, V items, R items of a range.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from llmgr_rec.baselines.knn import Baseline, ItemKNN, ItemNeighbors, Popularity, SessionKNN, session_matrix
from llmgr_rec.baselines.text_knn import TEXT_FIELDS, TextKNN, texts_to_compare
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.reader import SamplingOrder, SessionReader
from llmgr_rec.data.words import WORD_RULE
from llmgr_rec.errors import UserError
from llmgr_rec.registry import check_call, construct, resolve

logger = logging.getLogger(__name__)

# Builds a baseline from the training split and the catalog. The third argument is the number of neighbors per item;
# None is the default of the baseline.
BaselineBuilder = Callable[[Dataset, Catalog, int | None], Baseline]

# Sessions per batch when the training split is read.
_READ_ROWS = 8192


def training_matrix(dataset: Dataset, num_items: int) -> sparse.csr_array:
    """Reads the training sessions, targets included, as a sparse matrix [S, V]; see `session_matrix`.

    Args:
        dataset: The data set.
        num_items: Number of items V of the catalog.
    """
    return session_matrix(_training_sessions(dataset, num_items), num_items)


def item_sessions(dataset: Dataset, num_items: int, items: range) -> sparse.csr_array:
    """The training sessions of some items, targets included: 1 for each session with an item.

    Args:
        dataset: The data set.
        num_items: Number of items V of the catalog.
        items: Range of R items.

    Returns:
        Sparse matrix [R, S], float64.
    """
    found, sessions, done = [np.empty(0, np.int32)], [np.empty(0, np.int32)], 0
    for items_L, offsets_B1 in _training_sessions(dataset, num_items):
        (kept,) = np.nonzero((items_L >= items.start) & (items_L < items.stop))
        found.append((items_L[kept] - items.start).astype(np.int32))
        sessions.append((done + np.searchsorted(offsets_B1, kept, side="right") - 1).astype(np.int32))
        done += len(offsets_B1) - 1
    places = (np.concatenate(found), np.concatenate(sessions))
    matrix = sparse.coo_array((np.ones(len(places[0])), places), shape=(len(items), done)).tocsr()
    matrix.data[:] = 1.0
    return matrix


def _training_sessions(dataset: Dataset, num_items: int) -> Iterator[tuple[Any, Any]]:
    """Batches of training sessions, targets included: items_L and offsets_B1."""
    rows = SessionReader(
        dataset.parts("train"), num_items=num_items, collate=_with_target, order=SamplingOrder(_READ_ROWS)
    )
    return rows.batches(0)


def _popularity(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    return Popularity(catalog.train_count_V.numpy())


def _item_knn(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    return ItemKNN(training_matrix(dataset, catalog.num_items), k_neighbors=k_neighbors or 0)


def _session_knn(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    # Not `k_neighbors`, which is a number of items: the neighbors of session-kNN are sessions.
    return SessionKNN(training_matrix(dataset, catalog.num_items))


def _text_knn(dataset: Dataset, catalog: Catalog, k_neighbors: int | None) -> Baseline:
    texts = texts_to_compare(catalog)
    warn_of_word_rule(dataset, catalog)
    return TextKNN(texts) if k_neighbors is None else TextKNN(texts, k_neighbors=k_neighbors)


def warn_of_word_rule(dataset: Dataset, catalog: Catalog) -> None:
    """Logs a warning if another version split the titles of a data set into other words than this version would.

    Args:
        dataset: The data set.
        catalog: Its items.
    """
    if dataset.manifest.word_rule == WORD_RULE:
        return
    batches = catalog.text_batches(list(TEXT_FIELDS), range(catalog.num_items))
    if not all(text.isascii() for batch in batches for text in batch):
        _warn_once(dataset.path)


@functools.cache
def _warn_once(dataset: Path) -> None:
    logger.warning(
        "%s was prepared by another version, which split texts with other than ASCII characters into other words; "
        "text_knn splits them by the rule of this version, the side feature word does not. Prepare it again",
        dataset,
    )


BASELINES: dict[str, BaselineBuilder] = {
    "popularity": _popularity,
    "item_knn": _item_knn,
    "session_knn": _session_knn,
    "text_knn": _text_knn,
}
_SETTING = "setting blend.neighbors"
# Baselines that are matrices of item similarities, as a blend requires.
BLENDED = ("item_knn", "text_knn")
# Baselines that are evaluated by default. The others are not, because session-kNN is slow on long logs, and text-kNN
# requires item texts.
DEFAULT_BASELINES = ("popularity", "item_knn")


def baseline_builder(name: str, what: str = "baseline") -> BaselineBuilder:
    """Resolves the name of a baseline to its builder.

    Args:
        name: Key of `BASELINES`, or the import path of a function or class with the signature of `BaselineBuilder`.
        what: What the name belongs to, for error messages.

    Raises:
        UserError: There is no such baseline, or it cannot be called as one.
    """
    builder = resolve(name, BASELINES, what)
    arguments = ("dataset", "catalog", "k_neighbors")
    if not callable(builder):
        raise UserError(
            f"{what} is {name}, which cannot be called; give a function or class of ({', '.join(arguments)})"
        )
    check_call(builder, name, what, arguments)
    return builder


def check_blended(names: Iterable[str]) -> None:
    """Checks that baselines can be part of a blend.

    Args:
        names: Names of `BLENDED`, or import paths. Of a path to a function, only its existence is checked.

    Raises:
        UserError: There is no such baseline, or it has no matrix of item similarities.
    """
    for name in names:
        if name in BLENDED:
            continue
        builder = resolve(name, BASELINES, _SETTING)
        if name in BASELINES or (isinstance(builder, type) and not issubclass(builder, ItemNeighbors)):
            raise UserError(
                f"{_SETTING} names {name}, which has no matrix of item similarities; name "
                f"{', '.join(BLENDED)} or a baseline derived from llmgr_rec.baselines.knn.ItemNeighbors"
            )
        baseline_builder(name, _SETTING)


def build_baseline(name: str, dataset: Dataset, catalog: Catalog, k_neighbors: int | None = None) -> Baseline:
    """Builds a baseline from the training split or from the item texts.

    Args:
        name: Key of `BASELINES` or an import path; see `baseline_builder`.
        dataset: The data set.
        catalog: The items.
        k_neighbors: Number of neighbors per item of item_knn and text_knn; None uses their defaults.

    Raises:
        UserError: There is no such baseline, or it requires item texts and there are none.
    """
    baseline = construct(baseline_builder(name), name, "baseline", dataset, catalog, k_neighbors)
    if not isinstance(baseline, Baseline):
        raise UserError(
            f"baseline {name} made a {type(baseline).__name__} without a method rank; return a "
            "llmgr_rec.baselines.knn.Baseline"
        )
    return baseline


def check_baselines(names: Iterable[str], catalog: Catalog) -> None:
    """Checks that the data set has what the baselines require.

    Args:
        names: Names of baselines; other names are ignored.
        catalog: The items.

    Raises:
        UserError: A baseline requires item texts, and there are none.
    """
    if "text_knn" in names:
        texts_to_compare(catalog)


def _with_target(raw: RawSessions) -> tuple[Any, Any]:
    """Appends the target to each session; returns items_L and offsets_B1 as numpy arrays."""
    sessions = len(raw.targets_B)
    offsets_B1 = raw.offsets_B1 + torch.arange(sessions + 1)
    items_L = torch.empty(int(offsets_B1[-1]), dtype=torch.int64)
    is_target_L = torch.zeros(len(items_L), dtype=torch.bool)
    is_target_L[offsets_B1[1:] - 1] = True
    items_L[is_target_L] = raw.targets_B
    items_L[~is_target_L] = raw.items_L
    return items_L.numpy(), offsets_B1.numpy()
