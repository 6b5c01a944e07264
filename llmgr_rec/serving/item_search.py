"""Finds items of the catalog by words of their titles, or by their ids.

Shapes: V items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.popularity import by_popularity


class ItemSearch:
    """Finds items whose titles have all words of a query, the most popular ones first.

    An item without a title is found by its id.

    Args:
        catalog: The items.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._ids = catalog.item_ids
        self._titles = pa.array(catalog.titles(), pa.string())
        self._texts = pc.utf8_lower(pc.coalesce(self._titles, self._ids.cast(pa.string())))
        self._order_V = by_popularity(catalog.train_count_V.numpy())

    def find(self, query: str, limit: int) -> list[dict[str, Any]]:
        """Ids and titles of the items with all words of a query; words match within words.

        Args:
            query: Words; without any, the most popular items are found.
            limit: Maximum number of items.
        """
        is_found_V = np.ones(len(self._ids), bool)
        for word in query.lower().split():
            is_found_V &= pc.match_substring(self._texts, word).to_numpy(zero_copy_only=False)
        places = pa.array(self._order_V[is_found_V[self._order_V]][:limit])
        ids, titles = self._ids.take(places).to_pylist(), self._titles.take(places).to_pylist()
        return [{"item_id": item, "title": title} for item, title in zip(ids, titles, strict=True)]

    def titles_of(self, session: Sequence[str]) -> list[dict[str, Any]]:
        """Ids and titles of the clicks of a session; an unknown item has no title.

        Args:
            session: Item ids as text.
        """
        places = self._catalog.index_of(pa.array(session, pa.string()))
        known = pa.array(places, mask=places < 0)
        ids, titles = self._ids.take(known).to_pylist(), self._titles.take(known).to_pylist()
        return [
            {"item_id": given if item is None else item, "title": title, "is_known": item is not None}
            for given, item, title in zip(session, ids, titles, strict=True)
        ]
