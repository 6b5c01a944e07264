"""The models that a service ranks with: the bundles of a run, and the baselines that are shown beside them.

Shapes: B sessions, K places of a list, V items.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from llmgr_rec.config import STAGES, StageName
from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.results import MODEL_NAMES
from llmgr_rec.explanation.records import Explanation
from llmgr_rec.serving.item_search import ItemSearch
from llmgr_rec.serving.side_by_side import BaselineList, baseline_lists
from llmgr_rec.storage.bundle import open_bundle
from llmgr_rec.storage.bundle_index import (
    INDEX,
    STAGES_OF_MODEL,
    find_bundle,
    read_index,
    resolve_bundle,
)

_VERSION_LENGTH = 12


class SessionModel(Protocol):
    """What a service needs of a `Recommender`."""

    @property
    def item_ids(self) -> pa.Array:
        """Ids of the items of the catalog."""

    @property
    def titles(self) -> pa.Array:
        """Title of each item."""

    def recommend(
        self,
        sessions: Sequence[Sequence[Any]],
        k: int = 10,
        *,
        exclude_seen: bool | None = None,
        among: Collection[Any] | None = None,
        without: Collection[Any] = (),
        category: str | None = None,
        domain: str | None = None,
    ) -> pa.Table:
        """Ranks items for sessions."""

    def similar(self, items: Sequence[Any], k: int = 10) -> pa.Table:
        """Finds the items with the most similar vectors."""

    def explain(
        self,
        session: Sequence[Any],
        k: int = 5,
        *,
        items: Sequence[Any] | None = None,
        exclude_seen: bool | None = None,
    ) -> Explanation:
        """Explains recommendations for one session."""


@dataclass(frozen=True)
class ServedModel:
    """A loaded model.

    Args:
        name: Key of `STAGES_OF_MODEL`.
        title: Its name for people.
        stage: Stage that trained it.
        version: Changes with the content of the bundle.
        model: The model.
    """

    name: str
    title: str
    stage: StageName
    version: str
    model: SessionModel


@dataclass(frozen=True)
class ServedModels:
    """All that was loaded at once, so that the parts of an answer fit together.

    Args:
        models: Models by name, in the order in which they are shown.
        default: The model of the last stage, which answers if none is named.
        baselines: Lists that are shown beside those of the models.
        items: Finds items by title.
    """

    models: Mapping[str, ServedModel]
    default: ServedModel
    baselines: Sequence[BaselineList]
    items: ItemSearch

    def named(self, name: str | None) -> ServedModel:
        """A model by its name; None is the default.

        Raises:
            UserError: There is no such model.
        """
        if name is None:
            return self.default
        if name not in self.models:
            raise UserError(f"there is no model {name!r}; give one of {', '.join(self.models)}, or leave it out")
        return self.models[name]


def served_bundles(run: Path) -> dict[str, Path]:
    """The bundles of a run by the name of their model; of a bundle, itself.

    Args:
        run: A run, or a bundle.

    Raises:
        UserError: There is no complete bundle.
    """
    default = resolve_bundle(run)
    if default == run:
        stage = read_index(run).stage
        return {next(model for model, stages in STAGES_OF_MODEL.items() if stage in stages): run}
    return {model: bundle for model in STAGES_OF_MODEL if (bundle := find_bundle(default.parent, model))}


def bundle_version(bundle: Path) -> str:
    """Hash of a bundle's index, which has the checksums of all its files.

    Args:
        bundle: A bundle.
    """
    return hashlib.sha256((bundle / INDEX).read_bytes()).hexdigest()[:_VERSION_LENGTH]


def load_models(run: Path, load: Callable[[Path], SessionModel], allow_code: Collection[str] = ()) -> ServedModels:
    """Loads the models of a run.

    Args:
        run: A run, or a bundle.
        load: Loads a bundle.
        allow_code: Packages from which the bundles may import.

    Raises:
        UserError: There is no complete bundle, it is damaged, or bundles have different catalogs.
    """
    bundles = served_bundles(run)
    models = {}
    for name, bundle in bundles.items():
        version, stage = bundle_version(bundle), read_index(bundle).stage
        models[name] = ServedModel(name, MODEL_NAMES[name], stage, version, load(bundle))
    default = max(models.values(), key=lambda served: STAGES.index(served.stage))
    item_ids = default.model.item_ids
    if any(served.model.item_ids != item_ids for served in models.values()):
        raise UserError(f"the bundles of {run} have different catalogs; train its stages on one data set")
    for served in models.values():
        # The first call takes longer, which no request should see.
        served.model.recommend([item_ids[:1].to_pylist()], 1)
    files = open_bundle(bundles[default.name], allow_code)
    return ServedModels(
        models=models,
        default=default,
        baselines=baseline_lists(files),
        items=ItemSearch(files.catalog),
    )
