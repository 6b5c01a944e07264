"""Base class of towers: a trained recommender of a bundle as a module of a larger TorchRec model.

Shapes: B sessions, C shown items, Q columns of queries and item vectors.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn, optim
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.types import ShardedModule
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from llmgr_rec.arrow_input import to_ids
from llmgr_rec.config import StageName
from llmgr_rec.data.collate import ITEM_ID, LastItemsText
from llmgr_rec.data.jagged import Jagged
from llmgr_rec.distributed.process_group import World
from llmgr_rec.errors import UserError, did_you_mean
from llmgr_rec.evaluation.exclusion import ranking_rule
from llmgr_rec.modules.item_tables import ItemCollection, ItemTables
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.model_spec import query_width
from llmgr_rec.modules.param_groups import ParamGroup, param_group, select_trainable
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.remote_path import as_path
from llmgr_rec.storage.bundle import (
    BundleFiles,
    check_language_model,
    copy_weights,
    load_blend,
    load_blend_terms,
    open_bundle,
    require_memory,
)
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import is_complete
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from llmgr_rec.towers.differences import Differences, compare
from llmgr_rec.towers.features import BagKey, TowerBatch, TowerFeatures
from llmgr_rec.towers.item_collections import TableLayout, as_collection, given_layout, own_layout

SESSION, ITEM, SCORE = "session", "item", "score"

# Symbolic tracing, by which TorchRec's pipelines find the lookups, does not enter these functions.
torch.fx.wrap("as_keyed_tensor")
torch.fx.wrap("as_sessions")

# Where the values of the weights come from; "none" if they were never given any.
_Source = Literal["none", "unsharded", "sharded", "checkpoint"]


def as_keyed_tensor(queries_BQ: Tensor, items_CQ: Tensor, batch: TowerBatch) -> KeyedTensor:
    """Session vector, item vector and score of each shown item, a row each; zeros for an item that is not known."""
    session_CQ = queries_BQ.index_select(0, batch.session_of_row_R)
    known_items_CQ = items_CQ[: session_CQ.shape[0]] * batch.is_known_C1
    score_C1 = (session_CQ * known_items_CQ).sum(dim=1, keepdim=True)
    columns = queries_BQ.shape[1]
    return KeyedTensor(
        [SESSION, ITEM, SCORE], [columns, columns, 1], torch.cat([session_CQ, known_items_CQ, score_C1], dim=1)
    )


def as_sessions(queries_BQ: Tensor, batch: TowerBatch) -> KeyedTensor:
    """Session vectors, a row for each session."""
    return KeyedTensor([SESSION], [queries_BQ.shape[1]], queries_BQ.index_select(0, batch.session_of_row_R))


class RecommenderTower(nn.Module, ABC):
    """A trained recommender as a module that takes and returns ordinary TorchRec features; made by `from_bundle`.

    Args:
        model: The recommender.
        files: The bundle whose settings and catalog it was built from.
        layout: Its item tables.
        click_feature: Key of the clicks.
        item_feature: Key of the shown items; None if none are shown.
        trains: Parameter groups that train.
        text: Texts that its prompts show; None for none.

    Attributes:
        stages: Stages whose bundles the class takes.
        groups: Parameter groups of the class.
        default_trains: Parameter groups that train unless asked for otherwise.
    """

    stages: ClassVar[tuple[StageName, ...]]
    groups: ClassVar[tuple[ParamGroup, ...]]
    default_trains: ClassVar[tuple[ParamGroup, ...]]

    def __init__(
        self,
        model: SessionRecommender | LLMGR,
        files: BundleFiles,
        layout: TableLayout,
        click_feature: str,
        item_feature: str | None,
        trains: Collection[ParamGroup],
        text: LastItemsText | None = None,
    ) -> None:
        super().__init__()
        rule, catalog = ranking_rule(files.index), files.catalog
        used = {key.feature for key in layout.keys} - {ITEM_ID}
        self.features = TowerFeatures(
            catalog.num_items,
            {name: catalog.features.get(name, Jagged.empty(catalog.num_items)) for name in sorted(used)},
            layout.keys
            if any(key.name == ITEM_ID for key in layout.keys)
            else [*layout.keys, BagKey(ITEM_ID, ITEM_ID)],
            click_feature,
            item_feature,
            rule.max_length,
            files.index.consecutive_repeats == "merge",
            text,
        )
        # Not read from `features`, which a pipeline replaces.
        self.shows_items = item_feature is not None
        self.model = model
        self.trains = tuple(trains)
        self._files = files
        self._table_names = layout.table_names
        self._weights: _Source = "none"
        self._select_trainable()

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        *,
        click_feature: str = "clicks",
        item_feature: str | None = "items",
        item_tables: nn.Module | None = None,
        trains: Collection[str] | None = None,
        device: torch.device | str = "cpu",
        allow_code: Collection[str] = (),
    ) -> Self:
        """Builds a tower from a bundle.

        Its weights are loaded at once, unless its tables are on the meta device: then shard the model around it, and
        call `load`.

        Args:
            path: A bundle, or a run, whose default bundle is taken.
            click_feature: Key of the clicks in the features: item indices of each session, oldest first.
            item_feature: Key of the shown items; None if the tower only encodes sessions.
            item_tables: A collection with the tables of the bundle (EmbeddingBagCollection, EmbeddingCollection or
                FusedEmbeddingBagCollection), which becomes a part of the tower. The table of ids has the feature
                `click_feature`, `item_feature`, both, or `item_id`; the others that of their side feature. None makes
                an EmbeddingBagCollection.
            trains: Parameter groups that train, of those in `groups`; all others stay bit-identical. None takes
                `default_trains`.
            device: Device of the tables that are made; `meta` if the model will be sharded.
            allow_code: Modules and packages from which the bundle may import its encoder and head.

        Raises:
            UserError: There is no complete bundle, it is damaged or of another model, would import code that is not
                allowed, or `item_tables` does not fit; or a group is unknown.
        """
        chosen = _groups(cls.groups, cls.default_trains if trains is None else trains)
        files = open_bundle(as_path(path), allow_code)
        cls._check_stage(files)
        collection = None if item_tables is None else as_collection(item_tables)
        # The context of torch.device("meta") that a model may be built in is only meant for its tables.
        with torch.device("cpu"):
            tower = cls._build(files, click_feature, item_feature, collection, chosen, torch.device(device))
        if not any(parameter.is_meta for parameter in tower.parameters()):
            tower.load(files.path, allow_code=allow_code)
        return tower

    @classmethod
    def _build(
        cls,
        files: BundleFiles,
        click_feature: str,
        item_feature: str | None,
        collection: ItemCollection | None,
        trains: tuple[ParamGroup, ...],
        device: torch.device,
    ) -> Self:
        factory, config, catalog = ModelFactory(), files.config, files.catalog
        spec = factory.spec(files.index.stage, config, catalog)
        if files.index.language_model:
            check_language_model(files.index, factory.decoder_hash(config), files.path)
        language = factory.language_parts(spec, catalog, torch.device("cpu"))
        model = factory.build(spec, language, device if collection is None else next(collection.parameters()).device)
        known = [name for name in config.tables.side_features if name in catalog.num_embeddings]
        sizes = {ITEM_ID: catalog.num_items} | {name: catalog.num_embeddings[name] for name in known}
        layout = own_layout(sizes)
        if collection is not None:
            dim = config.tables.dim
            layout = given_layout(collection, sizes, dim, click_feature, item_feature)
            recommender = model.recommender if isinstance(model, LLMGR) else model
            recommender.item_tables = ItemTables(
                catalog.num_items, {}, dim, collection=collection, id_features=layout.id_features
            )
        text = factory.collator(spec, catalog, "rank").text
        shown = text if isinstance(text, LastItemsText) else None
        return cls(model, files, layout, click_feature, item_feature, trains, shown)

    @classmethod
    def _check_stage(cls, files: BundleFiles) -> None:
        if files.index.stage not in cls.stages:
            other = "LLMGRTower" if files.index.language_model else "SessionTower"
            raise UserError(
                f"{files.path} is a bundle of stage {files.index.stage}, which {cls.__name__} does not take; use "
                f"{other}, or a bundle of stage {' or '.join(cls.stages)}"
            )

    @property
    def recommender(self) -> SessionRecommender:
        """The session recommender in the model."""
        return self.model.recommender if isinstance(self.model, LLMGR) else self.model

    @property
    def item_tables(self) -> nn.Module:
        """The collection of the item tables; sharded once the model around the tower is."""
        return self.recommender.item_tables.ebc

    @property
    def num_items(self) -> int:
        """Size V of the catalog."""
        return self._files.catalog.num_items

    @property
    def dims(self) -> dict[str, int]:
        """Columns of each key of the output."""
        columns = query_width(self.model)
        return {SESSION: columns, ITEM: columns, SCORE: 1} if self.shows_items else {SESSION: columns}

    def index_of(self, item_ids: Sequence[Any]) -> Tensor:
        """Item index of each raw item id, int64; -1 for an unknown id.

        Args:
            item_ids: Ids as in the training data, text or integers.

        Raises:
            UserError: This is a single id, or the ids are neither all text nor all integers.
        """
        return torch.from_numpy(self._files.catalog.index_of(to_ids(item_ids, "item_ids")))

    def forward(
        self,
        features: KeyedJaggedTensor,
        items: KeyedJaggedTensor | None = None,
        session_of_item: Tensor | None = None,
    ) -> KeyedTensor:
        """Encodes each session once, and scores the items that it shows.

        Args:
            features: Clicks of each session (`click_feature`), oldest first, and the items that the session shows
                (`item_feature`), any number of both. Values are item indices, -1 for an unknown item. Other keys are
                ignored.
            items: The shown items, if they are not in `features`.
            session_of_item: Session of each shown item, a row number of `features`, int64 [C]. None takes the row of
                the item.

        Returns:
            A row for each shown item, in their order: `session` and `item`, [C, Q] each, and `score` [C, 1], their dot
            product. An unknown item has zeros, and so has a session without known clicks. Without `item_feature`, a row
            for each session: `session` [B, Q].

        Raises:
            UserError: The weights have not been loaded, or the features do not fit; see `TowerFeatures.forward`.
        """
        self._require_weights()
        return self.match(self.features(features, items, session_of_item))

    def match(self, batch: TowerBatch) -> KeyedTensor:
        """`forward` for features that a data loader has made by `tower.features`."""
        encoded = self._encode(batch)
        if not self.shows_items:
            return as_sessions(encoded[0], batch)
        return as_keyed_tensor(encoded[0], encoded[1], batch)

    @abstractmethod
    def _encode(self, batch: TowerBatch) -> tuple[Tensor, Tensor]:
        """Queries of the sessions [B, Q] and vectors of the shown items [C, Q]."""

    def train(self, mode: bool = True) -> Self:
        """Sets the training mode, except of the parts that do not train, which run without dropout."""
        super().train(mode)
        for name, part in self.model.named_modules():
            group = param_group(name)
            if group is not None and group not in self.trains:
                part.eval()
        return self

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters of each group by name; those of `tables` have optimizers of their own once they are sharded."""
        groups: dict[str, dict[str, nn.Parameter]] = {name: {} for name in self.groups}
        for name, parameter in self.named_parameters():
            group = param_group(name)
            if group in groups:
                groups[group][name] = parameter
        return groups

    def initialize(self, seed: int, std: float = 0.1) -> None:
        """Gives the item tables normal random values, to train from scratch; the same for any sharding.

        Args:
            seed: Seed.
            std: Standard deviation.

        Raises:
            UserError: Tables are on the meta device.
        """
        require_memory(self.model)
        init_tables(self.model, seed, std)
        self._weights = self._state()

    def load(self, path: str | os.PathLike[str], strict: bool = True, allow_code: Collection[str] = ()) -> Differences:
        """Copies the weights of a bundle into the tower; each rank reads only its shards of the tables.

        Call it after sharding, which gives all tables new values.

        Args:
            path: A bundle, or a run, whose default bundle is taken.
            strict: Whether any difference is an error: settings that change what the model computes, vocabularies of
                the catalog, and tensors that only one of the two has. Otherwise what fits is loaded.
            allow_code: Modules and packages from which the bundle may import its encoder and head.

        Returns:
            The differences; all empty if `strict`.

        Raises:
            UserError: The bundle is damaged or of another model, a shape differs, tables are on the meta device, or
                there is a difference and `strict` is true. Nothing has been loaded then.
        """
        files = open_bundle(as_path(path), allow_code)
        self._check_stage(files)
        require_memory(self.model)
        differences = compare(self.model, self._files, files, self._table_names)
        if strict and any(differences):
            raise UserError(
                f"bundle {files.path} does not fit the tower, which was made from {self._files.path}: {differences}; "
                "load a bundle of the same settings and data, or give strict=False to load what fits"
            )
        copy_weights(self.model, files.path, files.index, self._table_names)
        self._weights = self._state()
        return differences

    def save(self, run: str | os.PathLike[str]) -> None:
        """Writes the bundle `RUN/export/STAGE`, with the blend and the rules of the bundle the tower was made from.

        Args:
            run: Folder, on storage that all ranks share; all ranks call together. `Recommender.load` and
                `python -m llmgr_rec.score` take it.

        Raises:
            UserError: There is such a bundle already, a weight is not finite, the storage fails, or the bundle that the
                tower was made from is gone.
        """
        self._require_weights()
        files = self._files
        if not is_complete(files.path):
            raise UserError(
                f"{files.path} is gone, from which the tower was made; put it back, because its catalog and blend "
                "are saved, too"
            )
        blend = load_blend(files)
        if blend is not None:
            blend = replace(blend, terms=load_blend_terms(files))
        export_bundle(
            self.model,
            files.index.stage,
            files.config,
            files.catalog,
            as_path(run) / "export" / files.index.stage,
            World.current(next(self.parameters()).device),
            files.index,
            blend,
            table_names=self._table_names,
        )

    def _select_trainable(self) -> None:
        select_trainable(self, self.trains)
        frozen = [] if self.model.text_tables is None else [self.model.text_tables]
        if "tables" not in self.trains:
            frozen.append(self.item_tables)
        for collection in frozen:
            _freeze(collection)

    def _state(self) -> _Source:
        return "sharded" if isinstance(self.item_tables, ShardedModule) else "unsharded"

    def _require_weights(self) -> None:
        """Checks that no table has the random values that sharding gives it.

        Raises:
            UserError: It has.
        """
        if self._weights in ("checkpoint", self._state()):
            return
        lost = self._weights == "unsharded"
        raise UserError(
            f"the weights of the {type(self).__name__} of {self._files.path} "
            + ("were lost when it was sharded" if lost else "have not been loaded")
            + "; call its load(path) after sharding, or initialize(seed) to train from scratch"
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Called when a checkpoint of the model around the tower is loaded."""
        super()._load_from_state_dict(*args, **kwargs)
        self._weights = "checkpoint"


def _freeze(collection: nn.Module) -> None:
    """Gives each table an optimizer that leaves it unchanged.

    TorchRec ignores requires_grad and gives a table without optimizer a default one. SGD with a learning rate of 0 has
    no state.
    """
    if isinstance(collection, FusedEmbeddingBagCollection):
        raise UserError(
            "item_tables is a FusedEmbeddingBagCollection, which trains its tables; add tables to trains, or give an "
            "EmbeddingBagCollection"
        )
    for name, parameter in collection.named_parameters():
        if hasattr(parameter, "_optimizer_classes"):
            raise UserError(
                f"table {name.split('.')[-2]} of item_tables has an optimizer, but trains lacks tables; give the one "
                "or leave out the other"
            )
        parameter.requires_grad_(True)
        with torch.enable_grad():
            apply_optimizer_in_backward(optim.SGD, [parameter], {"lr": 0.0})


def _groups(known: tuple[ParamGroup, ...], given: Collection[str]) -> tuple[ParamGroup, ...]:
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"trains names {unknown[0]}{did_you_mean(unknown[0], known)}")
    return tuple(group for group in known if group in given)
