"""Side features by value: which category, brand or word each id of a catalog stands for."""

import json

import numpy as np
import pyarrow.parquet as pq

from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.preparation.items import frequent_title_words, vocabularies
from llmgr_rec.errors import UserError

# Schema metadata of items.parquet with the values by feature, where they do not follow from the texts alone.
VALUES_KEY = b"llmgr_rec.side_values"


def side_values(catalog: Catalog) -> dict[str, list[str]]:
    """The values of each side feature of a catalog, in order of their ids.

    Args:
        catalog: From a prepared data set or from a bundle.

    Raises:
        UserError: Another version of llmgr_rec split the texts of the catalog into other values.
    """
    if recorded := (pq.read_schema(catalog.file).metadata or {}).get(VALUES_KEY):
        values: dict[str, list[str]] = json.loads(recorded)
        return values
    features = vocabularies(frequent_title_words(catalog.titles()))
    found = {}
    for name, rows in catalog.features.items():
        vocabulary = features[name]
        ids = vocabulary.encode(catalog.column(vocabulary.column).to_pylist())
        flat = np.fromiter((value for row in ids for value in row), np.int64)
        if not np.array_equal(flat, rows.values.numpy()) or list(map(len, ids)) != rows.lengths.tolist():
            raise UserError(
                f"{catalog.file}: another version of llmgr_rec made the ids of feature {name}, which this version "
                "cannot name; prepare the data set and train again"
            )
        found[name] = list(vocabulary.ids)
    return found
