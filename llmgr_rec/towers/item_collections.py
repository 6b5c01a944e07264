"""Item tables that a tower is given in place of its own: which table is which, and what their features look up."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

from llmgr_rec.data.collate import ITEM_ID
from llmgr_rec.errors import UserError
from llmgr_rec.modules.item_tables import ItemCollection
from llmgr_rec.towers.features import BagKey


@dataclass(frozen=True)
class TableLayout:
    """Tables and features of an item collection.

    Args:
        keys: What each feature of the collection looks up.
        id_features: Features of the table of ids.
        table_names: Name in a bundle of each table.
    """

    keys: list[BagKey]
    id_features: list[str]
    table_names: dict[str, str]


def as_collection(module: nn.Module) -> ItemCollection:
    """The module, if it is a collection that item vectors can be looked up in.

    Raises:
        UserError: It is another module, or has weighted features.
    """
    if not isinstance(module, EmbeddingBagCollection | EmbeddingCollection | FusedEmbeddingBagCollection):
        raise UserError(
            f"item_tables is a {type(module).__name__}; give an EmbeddingBagCollection, a FusedEmbeddingBagCollection "
            "or an EmbeddingCollection, before it is sharded"
        )
    if not isinstance(module, EmbeddingCollection) and module.is_weighted():
        raise UserError("item_tables has weighted features; give a collection with is_weighted=False")
    return module


def own_layout(sizes: Mapping[str, int]) -> TableLayout:
    """Layout of the tables that a tower makes itself.

    Args:
        sizes: Rows of the table of ids (`item_id`) and of each side feature.
    """
    return TableLayout([BagKey(name, name) for name in sizes], [ITEM_ID], {name: name for name in sizes})


def given_layout(
    collection: ItemCollection, sizes: Mapping[str, int], dim: int, click_feature: str, item_feature: str | None
) -> TableLayout:
    """Layout of the tables of another team's collection.

    The table of ids is the one that the clicks or the shown items look up, the table of a side feature the one that has
    the feature of that name.

    Args:
        collection: The collection, unsharded.
        sizes: Rows of the table of ids (`item_id`) and of each side feature of the bundle.
        dim: Columns of each table.
        click_feature: Feature of the clicks.
        item_feature: Feature of the shown items.

    Raises:
        UserError: A table is missing, superfluous or has another size, or pools otherwise than the recommender does.
    """
    configs = (
        collection.embedding_configs()
        if isinstance(collection, EmbeddingCollection)
        else collection.embedding_bag_configs()
    )
    id_names = {name for name in (click_feature, item_feature, ITEM_ID) if name}
    keys: list[BagKey] = []
    id_features: list[str] = []
    names: dict[str, str] = {}
    for config in configs:
        features = list(config.feature_names)
        holds = ITEM_ID if set(features) <= id_names else features[0]
        if holds not in sizes or (holds != ITEM_ID and len(features) > 1) or holds in names.values():
            raise UserError(
                f"item_tables has the table {config.name} of {', '.join(features)}, which is not one of the tower's "
                f"({', '.join(sizes)}); give the tower a collection of its tables alone"
            )
        _check_table(config, holds, sizes[holds], dim)
        names[config.name] = holds
        keys += _keys(features, holds, click_feature, item_feature)
        if holds == ITEM_ID:
            id_features = features
    if missing := [name for name in sizes if name not in names.values()]:
        wanted = click_feature if missing[0] == ITEM_ID else missing[0]
        raise UserError(
            f"item_tables has no table with the feature {wanted}, which the bundle needs; add one of "
            f"{sizes[missing[0]]} rows and {dim} columns"
        )
    return TableLayout(keys, id_features, names)


def _keys(features: list[str], holds: str, click_feature: str, item_feature: str | None) -> list[BagKey]:
    if len(features) == 1:
        return [BagKey(features[0], holds)]
    if set(features) != {click_feature, item_feature}:
        raise UserError(
            f"item_tables looks up items by {', '.join(features)}; name the feature of the clicks ({click_feature}), "
            f"that of the shown items ({item_feature}), or both"
        )
    return [BagKey(name, holds, "nodes" if name == click_feature else "shown") for name in features]


def _check_table(config: BaseEmbeddingConfig, holds: str, rows: int, dim: int) -> None:
    if (config.num_embeddings, config.embedding_dim) != (rows, dim):
        raise UserError(
            f"table {config.name} of item_tables has {config.num_embeddings} rows and {config.embedding_dim} columns, "
            f"but {holds} of the bundle has {rows} and {dim}; give it this size"
        )
    pooling = PoolingType.SUM if holds == ITEM_ID else PoolingType.MEAN
    if isinstance(config, EmbeddingBagConfig) and holds != ITEM_ID and config.pooling != pooling:
        raise UserError(f"table {config.name} of item_tables sums its rows; set pooling=PoolingType.MEAN")
