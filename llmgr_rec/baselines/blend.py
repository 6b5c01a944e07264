"""The blend: nearest-neighbor scores that are added to the scores of a trained model when it ranks.

It is one sparse matrix of item similarities, stored in the bundle of the model.

Shapes: B sessions, L clicks of a session, V items, R items of a range, K items of a list.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from llmgr_rec.baselines.recency import recency_weights
from llmgr_rec.baselines.sparse_scores import Floats, Ints
from llmgr_rec.baselines.stored_columns import read_columns
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError
from llmgr_rec.kernels.score_terms import TermRows
from llmgr_rec.kernels.topk import Terms

# The product of sparse matrices takes time for each item of the catalog. With fewer similarities of clicked items than
# a 32nd of it, the columns of the neighbors are taken out first.
_FEW_ENTRIES = 32
# A similarity with a non-zero value for one in so many pairs of items is multiplied as a matrix, up to a size.
_MANY_ENTRIES = 8
_MAX_DENSE = 1 << 24


@dataclass(frozen=True)
class Blend:
    """Weighted sum of item-neighbor baselines (item-kNN, text-kNN), as one similarity matrix.

    The score that is added for item j is the sum over the clicks i of a session of
    decay^(number of clicks after i) * similarity(i, j).

    Args:
        weights: Weight of each baseline in the similarity, by name.
        similarity_VR: Similarity of clicked items (rows) and ranked items (columns), float32.
        decay: Weight of a click relative to the click after it.
        terms: The blends of one baseline each that add up to this one, weights included; empty if there is only one, or
            if they are not known. Ranking does not use them, explaining does.
        trees: Trees that rank the best items again, as LightGBM writes them; see `baselines.reranker`. Empty for none.
    """

    weights: Mapping[str, float]
    similarity_VR: sparse.csr_array
    decay: float
    terms: tuple["Blend", ...] = ()
    trees: str = ""

    def terms_of_scores(self, clicks: Jagged) -> Terms:
        """`scores` in the form that ranks fastest: dense where most items are similar to each other.

        Args:
            clicks: Item indices of each session, oldest first; on any device.
        """
        dense_VR = self._dense_VR if clicks.values.device.type == "cpu" else None
        if dense_VR is None:
            return self.scores(clicks)
        weights_BV = recency_weights(clicks.values.numpy(), clicks.offsets.numpy(), self.decay, len(dense_VR))
        weights_L = torch.from_numpy(weights_BV.data.astype(np.float32))
        return functional.embedding_bag(
            clicks.values, dense_VR, clicks.offsets[:-1], mode="sum", per_sample_weights=weights_L
        )

    @cached_property
    def _dense_VR(self) -> Tensor | None:
        """The similarity as a matrix, where that is small and most of it not 0."""
        size = math.prod(self.similarity_VR.shape)
        if size > _MAX_DENSE or _MANY_ENTRIES * self.similarity_VR.nnz < size:
            return None
        return torch.from_numpy(self.similarity_VR.toarray())

    def scores(self, clicks: Jagged) -> sparse.csr_array:
        """Scores to be added to those of the model, float32 [B, R], with unsorted indices and without duplicates.

        Args:
            clicks: Item indices of each session, oldest first; on any device.
        """
        items_L, offsets_B1 = clicks.values.cpu().numpy(), clicks.offsets.cpu().numpy()
        row_starts, num_items = self.similarity_VR.indptr, self.similarity_VR.shape[1]
        if _FEW_ENTRIES * int((row_starts[items_L + 1] - row_starts[items_L]).sum()) < num_items:
            return self._scores_of_few(items_L, offsets_B1)
        weights_BV = recency_weights(items_L, offsets_B1, self.decay, self.similarity_VR.shape[0])
        # float32 like the similarity, which scipy would otherwise convert for each batch.
        return sparse.csr_array(weights_BV.astype(np.float32) @ self.similarity_VR)

    def _scores_of_few(self, items_L: Ints, offsets_B1: Ints) -> sparse.csr_array:
        """The same sums over the neighbors of the clicks only, in time that does not depend on the number of items."""
        clicked, rows_L = np.unique(items_L, return_inverse=True)
        of_clicked = self.similarity_VR[clicked]
        neighbors_U, columns = np.unique(of_clicked.indices, return_inverse=True)
        shape = (len(clicked), len(neighbors_U))
        similarity = sparse.csr_array((of_clicked.data, columns, of_clicked.indptr), shape=shape)
        weights = recency_weights(rows_L, offsets_B1, self.decay, len(clicked)).astype(np.float32)
        sums_BU = sparse.csr_array(weights @ similarity)
        shape = (len(offsets_B1) - 1, self.similarity_VR.shape[1])
        return sparse.csr_array((sums_BU.data, neighbors_U[sums_BU.indices], sums_BU.indptr), shape=shape)

    def term_rows(self, clicks: Jagged) -> TermRows | None:
        """The summands of `scores`: a row for each click, whose sums over the clicks of a session are its scores.

        None if there are more of them than scores, which would take more memory than their sums.

        Args:
            clicks: Item indices of each session, oldest first; on the CPU.
        """
        items_L, offsets_B1 = clicks.values.numpy(), clicks.offsets.numpy()
        row_starts, num_items = self.similarity_VR.indptr, self.similarity_VR.shape[1]
        if int((row_starts[items_L + 1] - row_starts[items_L]).sum()) > clicks.num_rows * num_items:
            return None
        weights_L = recency_weights(items_L, offsets_B1, self.decay, self.similarity_VR.shape[0]).data
        rows_LR = self.similarity_VR[items_L]
        rows_LR.data *= np.repeat(weights_L.astype(np.float32), np.diff(rows_LR.indptr))
        return TermRows(rows_LR, offsets_B1)

    def scores_of_session(self, clicks: Ints) -> tuple[Ints, NDArray[np.float32]]:
        """The same sums for one session, in less time.

        Args:
            clicks: Item indices of its L clicks, oldest first.

        Returns:
            Indices of the neighbors, ascending, and their scores, float32.
        """
        similarity, row_starts = self.similarity_VR, self.similarity_VR.indptr
        rows = [slice(row_starts[item], row_starts[item + 1]) for item in clicks]
        weights = (self.decay ** np.arange(len(rows) - 1, -1, -1)).astype(np.float32)
        if not rows:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        items = np.concatenate([similarity.indices[row] for row in rows])
        terms = np.concatenate([similarity.data[row] * weight for row, weight in zip(rows, weights, strict=True)])
        # Stable, so that the terms of a neighbor are added in order of the clicks.
        order = np.argsort(items, kind="stable")
        sorted_items = items[order]
        firsts = np.flatnonzero(np.diff(sorted_items, prepend=-1))
        sums = np.add.reduceat(terms[order], firsts) if len(firsts) else terms
        return sorted_items[firsts].astype(np.int64), sums

    def click_scores(self, clicks: Ints, items: Ints) -> tuple[Floats, Floats]:
        """The summands of `scores` for one session: what each click adds to the scores of some items.

        Args:
            clicks: Item indices of the session's L clicks, oldest first.
            items: Indices of K items.

        Returns:
            Weight of each click by its recency, [L], and weight times similarity, [L, K]; both float64.
        """
        one_session = np.array([0, len(clicks)])
        # One entry a click, in their order.
        recency_L = recency_weights(clicks, one_session, self.decay, self.similarity_VR.shape[0]).data
        similarity_LK = self.similarity_VR[clicks][:, items].toarray().astype(np.float64)
        return recency_L, recency_L[:, None] * similarity_LK

    def of_items(self, items: range | Ints) -> "Blend":
        """Selects some of the ranked items (columns); the clicked items (rows) stay.

        Args:
            items: Contiguous range of item indices, or ascending indices.
        """
        if len(items) == self.similarity_VR.shape[1]:
            return self
        columns = slice(items.start, items.stop) if isinstance(items, range) else items
        return replace(self, similarity_VR=sparse.csr_array(self.similarity_VR[:, columns]), terms=())

    def save(self, file: Path) -> None:
        """Writes the blend without its terms as an npz file without pickled objects. Equal blends give equal bytes.

        Args:
            file: File with the suffix npz.
        """
        np.savez(
            file,
            names=np.array(list(self.weights), np.str_),
            weights=np.array(list(self.weights.values()), np.float64),
            decay=np.float64(self.decay),
            indptr=self.similarity_VR.indptr.astype(np.int64),
            indices=self.similarity_VR.indices.astype(np.int64),
            values=self.similarity_VR.data,
            trees=np.frombuffer(self.trees.encode(), np.uint8),
        )

    @classmethod
    def load(cls, file: Path, items: range | None = None, num_columns: int | None = None) -> "Blend":
        """Reads a file written by `save`.

        Args:
            file: The file.
            items: Ranked items (columns) to read, in memory for these; None reads all.
            num_columns: Number of ranked items of the file; None for all items.

        Raises:
            UserError: The file is damaged.
        """
        try:
            # np.load would not close a damaged file that it opened itself.
            with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as stored:
                weights = dict(zip(stored["names"].tolist(), stored["weights"].tolist(), strict=True))
                decay = float(stored["decay"])
                # Earlier versions wrote none.
                trees = stored["trees"].tobytes().decode() if "trees" in stored else ""
                if items is not None:
                    return cls(weights, read_columns(opened, items), decay, trees=trees)
                num_items = len(stored["indptr"]) - 1
                # Half of the memory of the 64 bits in the file.
                index_dtype = np.int32 if len(stored["values"]) < 1 << 31 else np.int64
                indices, indptr = (stored[name].astype(index_dtype) for name in ("indices", "indptr"))
                similarity_VV = sparse.csr_array(
                    (stored["values"], indices, indptr), shape=(num_items, num_columns or num_items)
                )
                similarity_VV.check_format()
                return cls(weights, similarity_VV, decay, trees=trees)
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, BadZipFile) as error:
            raise UserError(
                f"{file} is damaged ({' '.join(str(error).split())}); copy the bundle again, or train its stage again"
            ) from None


def combine(blends: Sequence[Blend], weights: Sequence[float]) -> Blend:
    """Weighted sum of blends with the same decay.

    Args:
        blends: One or more blends of one baseline each, with weight 1.
        weights: Weight of each blend.

    Raises:
        UserError: The decays differ.
    """
    if len({blend.decay for blend in blends}) > 1:
        names = ", ".join(f"{name} ({blend.decay:g})" for blend in blends for name in blend.weights)
        raise UserError(
            f"baselines {names} cannot be blended together, because their decays differ; give them the same decay"
        )
    terms = tuple(
        replace(blend, weights={name: float(weight) for name in blend.weights}, similarity_VR=_times(blend, weight))
        for blend, weight in zip(blends, weights, strict=True)
        if weight
    )
    if len(terms) == 1:
        similarity_VV = terms[0].similarity_VR
    else:
        similarity_VV = sparse.csr_array(blends[0].similarity_VR.shape, dtype=np.float32)
        for number, term in enumerate(terms):
            similarity_VV = similarity_VV + term.similarity_VR if number else term.similarity_VR
    named = {name: float(weight) for blend, weight in zip(blends, weights, strict=True) for name in blend.weights}
    return Blend(named, sparse.csr_array(similarity_VV), blends[0].decay, terms if len(terms) > 1 else ())


def _times(blend: Blend, weight: float) -> sparse.csr_array:
    """The similarity times a weight; shares the indices, which may take many gigabytes."""
    matrix = blend.similarity_VR
    return sparse.csr_array((matrix.data * np.float32(weight), matrix.indices, matrix.indptr), shape=matrix.shape)


def clicks_of(batch: SessionBatch) -> Jagged:
    """Item indices of the clicks of each session of a batch, oldest first, from the session graphs."""
    graph = batch.graph
    return Jagged(graph.node_items_N.index_select(0, graph.alias_L), graph.click_offsets_B1)
