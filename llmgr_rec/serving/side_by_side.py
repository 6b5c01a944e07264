"""Baselines that the page shows beside the trained models: popularity, and the nearest neighbors that the run has.

Shapes: B sessions, K places of a list, V items.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llmgr_rec.baselines.blend import Blend
from llmgr_rec.baselines.knn import Baseline, ItemNeighbors, Popularity
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.evaluation.exclusion import ranked_by, ranking_rule
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.scoring.click_lists import flat_clicks, known_clicks
from llmgr_rec.storage.bundle_index import BLEND, read_index, verified_file

# Cached by the training, relative to the run: the neighbors of a baseline with weight 1.
_NEIGHBORS = "neighbors/item_knn-*.npz"


class BaselineList:
    """A baseline that ranks by the rule of a bundle.

    Args:
        name: Key of `MODEL_NAMES`.
        title: Its name for people.
        baseline: The baseline.
        bundle: The bundle.
        catalog: The catalog of the bundle.
    """

    def __init__(self, name: str, title: str, baseline: Baseline, bundle: Path, catalog: Catalog) -> None:
        self.name, self.title = name, title
        self._baseline, self._catalog = baseline, catalog
        self._titles = pa.array(catalog.titles(), pa.string())
        index = read_index(bundle)
        self._rule = ranking_rule(index)
        self._merges_repeats = index.consecutive_repeats == "merge"

    def recommend(self, session: Sequence[str], k: int) -> dict[str, Any]:
        """The K best items of a session, as a row of `Recommender.recommend` without scores.

        Args:
            session: Item ids as text, oldest click first.
            k: Maximum number of items.
        """
        ids_L, offsets_B1, _ = flat_clicks(pa.chunked_array([pa.array([session], pa.list_(pa.string()))]))
        clicks = Jagged(*map(torch.from_numpy, known_clicks(self._catalog.index_of(ids_L), offsets_B1)))
        if self._merges_repeats:
            clicks = clicks.without_consecutive_repeats()
        sessions = RawSessions.to_rank(clicks.last(self._rule.max_length))
        (ids_K,) = ranked_by(self._baseline, sessions, min(k, self._catalog.num_items), self._rule.excludes_seen)
        places = pa.array(ids_K[ids_K >= 0])
        return {
            "fallback": clicks.values.numel() == 0,
            "item_ids": self._catalog.item_ids.take(places).to_pylist(),
            "titles": self._titles.take(places).to_pylist(),
        }


def baseline_lists(bundle: Path, run: Path) -> list[BaselineList]:
    """Popularity, and item-kNN or, where the run has only their sum, the neighbors that its models blend.

    Args:
        bundle: A bundle of the run.
        run: The run, or the bundle.
    """
    catalog = Catalog.load(bundle)
    popularity = Popularity(catalog.train_count_V.numpy())
    lists = [BaselineList("popularity", MODEL_NAMES["popularity"], popularity, bundle, catalog)]
    index = read_index(bundle)
    cached = sorted(run.glob(_NEIGHBORS), key=lambda file: file.stat().st_mtime)
    blend = None
    if cached:
        blend = Blend.load(cached[-1])
    elif BLEND in index.files:
        blend = Blend.load(verified_file(bundle, index, BLEND))
    if blend is not None and blend.similarity_VR.shape[0] == catalog.num_items:
        names = [name for name, weight in blend.weights.items() if weight]
        title = " + ".join(MODEL_NAMES.get(name, name) for name in names)
        neighbors = ItemNeighbors(blend.similarity_VR.astype(np.float64), blend.decay)
        lists.append(BaselineList("item_knn", title, neighbors, bundle, catalog))
    return lists
