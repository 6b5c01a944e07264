"""The blend: what neighbor baselines add to a trained model's scores. One matrix of items, part of the bundle.

Shapes: B sessions, L clicks, V items, R items of one range.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from scipy import sparse

from llmgr_rec.baselines.recency import recency_weights
from llmgr_rec.data.batch import SessionBatch
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.errors import UserError


@dataclass(frozen=True)
class Blend:
    """Adds to item j's score: sum over the clicks i of a session of decay^(clicks after i) * similarity(i, j).

    Args:
        weights: Factor of each baseline in the similarity, by name.
        similarity_VR: What a click on item i adds to item j, float32; absent ones are 0.
        decay: Weight of a click relative to the click after it.
    """

    weights: Mapping[str, float]
    similarity_VR: sparse.csr_array
    decay: float

    def scores(self, clicks: Jagged) -> sparse.csr_array:
        """What is added to the scores of each session, float32 [B, R]; each item once a row, in no order.

        Args:
            clicks: Item indices of each session, oldest first; on any device.
        """
        items_L, offsets_B1 = clicks.values.cpu().numpy(), clicks.offsets.cpu().numpy()
        weights_BV = recency_weights(items_L, offsets_B1, self.decay, self.similarity_VR.shape[0])
        # Of one type with the similarity, which would otherwise be copied for each batch.
        return sparse.csr_array(weights_BV.astype(np.float32) @ self.similarity_VR)

    def of_items(self, items: range) -> "Blend":
        """The part for a range of the items that are ranked; any item may be clicked.

        Args:
            items: Items, without gaps.
        """
        if len(items) == self.similarity_VR.shape[1]:
            return self
        return replace(self, similarity_VR=sparse.csr_array(self.similarity_VR[:, items.start : items.stop]))

    def save(self, file: Path) -> None:
        """Writes the blend, without pickles; the same blend makes the same bytes.

        Args:
            file: Name with the suffix npz.
        """
        np.savez(
            file,
            names=np.array(list(self.weights), np.str_),
            weights=np.array(list(self.weights.values()), np.float64),
            decay=np.float64(self.decay),
            indptr=self.similarity_VR.indptr,
            indices=self.similarity_VR.indices,
            values=self.similarity_VR.data,
        )

    @classmethod
    def load(cls, file: Path) -> "Blend":
        """Reads what `save` wrote.

        Raises:
            UserError: The file is damaged.
        """
        try:
            # Opened here, because np.load leaves a damaged file open.
            with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as stored:
                num_items = len(stored["indptr"]) - 1
                similarity_VV = sparse.csr_array(
                    (stored["values"], stored["indices"], stored["indptr"]), shape=(num_items, num_items)
                )
                similarity_VV.check_format()
                weights = dict(zip(stored["names"].tolist(), stored["weights"].tolist(), strict=True))
                return cls(weights, similarity_VV, float(stored["decay"]))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(
                f"{file} is damaged ({' '.join(str(error).split())}); copy the bundle again, or train its stage again"
            ) from None


def combine(blends: Sequence[Blend], weights: Sequence[float]) -> Blend:
    """One blend of several, whose clicks all decay alike.

    Args:
        blends: One baseline each, at weight 1; at least one.
        weights: The factor that each gets.

    Raises:
        UserError: Their clicks decay differently.
    """
    if len({blend.decay for blend in blends}) > 1:
        names = ", ".join(f"{name} ({blend.decay:g})" for blend in blends for name in blend.weights)
        raise UserError(
            f"baselines {names} cannot be blended together, because their decays differ; give them the same"
        )
    similarity_VV = sparse.csr_array(blends[0].similarity_VR.shape, dtype=np.float32)
    for blend, weight in zip(blends, weights, strict=True):
        if weight:
            similarity_VV = similarity_VV + blend.similarity_VR * np.float32(weight)
    named = {name: float(weight) for blend, weight in zip(blends, weights, strict=True) for name in blend.weights}
    return Blend(named, sparse.csr_array(similarity_VV), blends[0].decay)


def clicks_of(batch: SessionBatch) -> Jagged:
    """The clicks of a batch's sessions, oldest first, as the session graphs hold them."""
    graph = batch.graph
    return Jagged(graph.node_items_N.index_select(0, graph.alias_L), graph.click_offsets_B1)
