"""Baselines that the page shows beside the trained models: popularity, and the nearest neighbors that the run has.

Shapes: B sessions, K places of a list, V items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from llmgr_rec.baselines.in_domains import in_domains, popular_items
from llmgr_rec.baselines.knn import Baseline, ItemNeighbors, Popularity
from llmgr_rec.data.batch import RawSessions
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.evaluation.exclusion import ranked_by, ranking_rule
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.scoring.click_lists import flat_clicks, known_clicks
from llmgr_rec.storage.bundle import BundleFiles, load_blend, load_blend_terms

_ITEM_KNN = "item_knn"


class BaselineList:
    """A baseline that ranks by the rule of a bundle.

    Args:
        name: Key of `MODEL_NAMES`.
        title: Its name for people.
        baseline: The baseline.
        files: The opened bundle.
    """

    def __init__(self, name: str, title: str, baseline: Baseline, files: BundleFiles) -> None:
        self.name, self.title = name, title
        self._baseline, self._catalog = in_domains(baseline, files.catalog.domains), files.catalog
        self._popularity = Popularity(files.catalog.train_count_V.numpy())
        self._titles = pa.array(files.catalog.titles(), pa.string())
        self._rule = ranking_rule(files.index)
        self._merges_repeats = files.index.consecutive_repeats == "merge"

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
        k, fallback = min(k, self._catalog.num_items), clicks.values.numel() == 0
        if fallback:
            # As the models, by the domain that the newest id names.
            domains = self._catalog.domains
            domain_B = np.array([-1]) if domains is None else domains.of_ids(ids_L, offsets_B1)
            (ids_K,), _ = popular_items(self._popularity, domains, domain_B, k)
        else:
            sessions = RawSessions.to_rank(clicks.last(self._rule.max_length))
            (ids_K,), _ = ranked_by(self._baseline, sessions, k, self._rule.excludes_seen)
        places = pa.array(ids_K[ids_K >= 0])
        return {
            "fallback": fallback,
            "item_ids": self._catalog.item_ids.take(places).to_pylist(),
            "titles": self._titles.take(places).to_pylist(),
        }


def baseline_lists(files: BundleFiles) -> list[BaselineList]:
    """Popularity, and item-kNN or, where a bundle has only their sum, the neighbors that its model blends.

    Args:
        files: The opened bundle of a model.

    Raises:
        UserError: The bundle is damaged.
    """
    popularity = Popularity(files.catalog.train_count_V.numpy())
    lists = [BaselineList("popularity", MODEL_NAMES["popularity"], popularity, files)]
    if (blend := load_blend(files)) is not None:
        chosen = next((term for term in load_blend_terms(files) if _ITEM_KNN in term.weights), blend)
        title = " + ".join(MODEL_NAMES.get(name, name) for name, weight in chosen.weights.items() if weight)
        neighbors = ItemNeighbors(chosen.similarity_VR.astype(np.float64), chosen.decay)
        lists.append(BaselineList(_ITEM_KNN, title, neighbors, files))
    return lists
