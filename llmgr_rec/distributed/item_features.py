"""Features by which a rank compares its items: their training sessions, or their words.

Shapes: V items, R items of a range, T distinct words, U items of a batch.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from scipy import sparse

from llmgr_rec.baselines.builders import item_sessions, warn_of_word_rule
from llmgr_rec.baselines.text_knn import TEXT_FIELDS, WordIds, tf_idf_rows
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.distributed.collectives import sum_over_ranks
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sparse_exchange import through_ranks

logger = logging.getLogger(__name__)


def sessions_of_items(
    dataset: Dataset, catalog: Catalog, items: range, world: World, group: dist.ProcessGroup | None
) -> sparse.csr_array:
    """The training sessions of each item of a range, float64 [R, S]; every rank reads all sessions.

    Args:
        dataset: Prepared sessions.
        catalog: Their items.
        items: The items.
        world: Ranks.
        group: Group of all ranks on the CPU.
    """
    return item_sessions(dataset, catalog.num_items, items)


def words_of_items(
    dataset: Dataset, catalog: Catalog, items: range, world: World, group: dist.ProcessGroup | None
) -> sparse.csr_array:
    """The words of each item of a range and their weights, float64 [R, T]; see `baselines.text_knn.tf_idf`.

    Each rank splits the texts of its own items only. A word has the same number as in a single process.

    Args:
        dataset: Prepared sessions.
        catalog: Their items.
        items: The items of this rank; together, the ranges of all ranks are the catalog in its order.
        world: Ranks; all call together.
        group: Group of all ranks on the CPU.
    """
    if world.rank == 0:
        warn_of_word_rule(dataset, catalog)
    own = WordIds()
    batches = [own.encode(texts) for texts in catalog.text_batches(list(TEXT_FIELDS), items)]

    def add(known: list[str]) -> list[str]:
        return list(dict.fromkeys([*known, *own.words]))

    known = through_ranks(list[str](), add, world.rank, world.size, group)
    place = {word: number for number, word in enumerate(known)}
    number_T = np.array([place[word] for word in own.words], np.int32)
    size = torch.tensor([len(known)])
    if world.size > 1:
        dist.broadcast(size, world.size - 1, group)
    if not size and world.rank == 0:
        logger.warning("%s: no item has a word in %s, so text_knn adds nothing", catalog.file, ", ".join(TEXT_FIELDS))
    count_T = torch.zeros(int(size), dtype=torch.int64)
    for word_W, _ in batches:
        count_T += torch.from_numpy(np.bincount(number_T[word_W], minlength=len(count_T)))
    sum_over_ranks(count_T, world, group)
    rows = [sparse.csr_array((0, len(count_T)))]
    for word_W, length_U in batches:
        rows.append(tf_idf_rows(number_T[word_W], length_U, count_T.numpy(), catalog.num_items))
    return sparse.csr_array(sparse.vstack(rows, format="csr"))


# Features of the baselines that are cosines of items, by name.
FEATURES: dict[str, Callable[[Dataset, Catalog, range, World, dist.ProcessGroup | None], sparse.csr_array]] = {
    "item_knn": sessions_of_items,
    "text_knn": words_of_items,
}
