"""Training that starts from the models of another run, of the same settings and maybe other items (`--init_from`).

Stage sbr starts from tables and encoder of the other run. The first stage with a language model takes what stage
sbr does not have (adapter, LoRA, head; or the text sequence encoder) from the last stage of the other run that has it.
Later stages go on from the stage before, as in any run. The state of the optimizers is new.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmgr_rec.config import Config, StageName, settings
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.schema import ITEMS_NAME
from llmgr_rec.distributed.process_group import World, run_on_rank0
from llmgr_rec.errors import UserError
from llmgr_rec.files import atomic_write
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.remote_path import as_path
from llmgr_rec.storage.bundle import copy_weights, load_weights
from llmgr_rec.storage.bundle_index import (
    INDEX,
    STAGES_OF_MODEL,
    find_bundle,
    model_of_stage,
    read_config,
    read_index,
    resolve_bundle,
    verified_file,
)
from llmgr_rec.storage.catalog_mapping import CatalogMapping
from llmgr_rec.storage.fingerprint import inherited_settings
from llmgr_rec.storage.model_factory import ModelFactory

logger = logging.getLogger(__name__)

# File of a run with the run that it started from, for when it is resumed.
INIT_FROM = "init_from.json"
# Settings of stage llm_text that determine the shapes of its weights.
_TEXT_ENCODER_SETTINGS = ("text_encoder.dim", "llm.name_or_path", "llm.num_layers")


@dataclass(frozen=True)
class WarmStart:
    """The bundles of another run that a training starts from.

    Args:
        run: The other run, or a bundle.
        bundles: Its bundle of each model that it has, see `STAGES_OF_MODEL`.
        catalog: Its items.
    """

    run: Path
    bundles: Mapping[str, Path]
    catalog: Catalog

    @classmethod
    def open(cls, run: Path) -> "WarmStart":
        """Reads the indices and the catalog of a run.

        Args:
            run: A run, or a bundle.

        Raises:
            UserError: It has no complete bundle, or one is damaged.
        """
        last = resolve_bundle(run)
        found = {} if last == run else {model: find_bundle(last.parent, model) for model in STAGES_OF_MODEL}
        bundles = {model: bundle for model, bundle in found.items() if bundle}
        # Each bundle has tables and encoder.
        bundles = {"sbr": last, model_of_stage(read_index(last).stage): last} | bundles
        file = verified_file(bundles["sbr"], read_index(bundles["sbr"]), ITEMS_NAME)
        return cls(run, bundles, Catalog.load(file.parent))

    def check(self, config: Config, stages: Sequence[StageName], factory: ModelFactory) -> None:
        """Checks that the models of a run under other settings can start from the bundles.

        Args:
            config: Settings of the new run.
            stages: Stages that it trains.
            factory: Its model factory.

        Raises:
            UserError: A setting of the models differs, or the base language model does.
        """
        models = {model_of_stage(stage) for stage in stages}
        for model, bundle in self.bundles.items():
            if model not in models:
                continue
            index, trained = read_index(bundle), read_config(bundle)
            if index.factory != factory.name:
                raise UserError(
                    f"--init_from {self.run}: {bundle} was made with {index.factory or 'no'} controls, not with "
                    f"{factory.name or 'none'}; give another run"
                )
            _check_settings(model, index.stage, trained, config, bundle)
            if index.language_model and factory.decoder_hash(config) != index.language_model["weights_hash"]:
                raise UserError(
                    f"setting llm.name_or_path is {config.llm.name_or_path}, but {bundle} was trained with "
                    f"{index.language_model['name']}, whose weights differ; give the same model, or train without "
                    "--init_from"
                )

    def mapping(self, catalog: Catalog, world: World) -> CatalogMapping:
        """The rows of the tables of a new catalog; rank 0 logs the numbers of items.

        Args:
            catalog: Items of the new run.
            world: Ranks; all call together.
        """
        mapping = run_on_rank0(world, lambda: CatalogMapping.between(self.catalog, catalog))
        if world.rank == 0:
            logger.info("starting from %s: %s", self.run, mapping.summary())
        return mapping

    def load_recommender(self, model: SessionRecommender | LLMGR, mapping: CatalogMapping) -> None:
        """Copies tables and encoder into the model of stage sbr, whose tables have their initial rows.

        Args:
            model: The model, sharded or not.
            mapping: From `mapping`.
        """
        load_weights(model, self.bundles["sbr"], mapping)

    def load_missing(
        self,
        model: SessionRecommender | LLMGR,
        stage: StageName,
        missing: Sequence[str],
        mapping: CatalogMapping,
    ) -> list[str]:
        """Copies what a later stage has and the stage before it has not.

        Args:
            model: The model of the later stage.
            stage: The later stage.
            missing: Names of the parameters and buffers that the stage before has not.
            mapping: From `mapping`.

        Returns:
            Those that the other run has not either.
        """
        bundle = self.bundles.get(model_of_stage(stage))
        if bundle is None or not missing:
            return list(missing)
        return copy_weights(model, bundle, read_index(bundle), mapping=mapping, only=set(missing))

    def record(self, output: Path) -> None:
        """Writes to a run folder what the run started from.

        Args:
            output: The run folder.
        """
        with atomic_write(output / INIT_FROM) as partial:
            partial.write_text(json.dumps(self._identity(), indent=2) + "\n")

    def check_recorded(self, output: Path) -> None:
        """Checks that a run is resumed with the run that it started from.

        Args:
            output: Folder of the resumed run.

        Raises:
            UserError: It is another one, or it has changed.
        """
        if json.loads((output / INIT_FROM).read_text()) != self._identity():
            raise UserError(
                f"{output} was started with --init_from {recorded_run(output)}, and --init_from {self.run} is another "
                "run or has changed since; give the same, or another --output"
            )

    def _identity(self) -> dict[str, Any]:
        hashes = {
            model: hashlib.sha256((bundle / INDEX).read_bytes()).hexdigest() for model, bundle in self.bundles.items()
        }
        return {"run": str(self.run.resolve()), "bundles": hashes}


def recorded_run(output: Path) -> Path | None:
    """The run that the run of a folder started from; None if it started from none.

    Args:
        output: Run folder.

    Raises:
        UserError: The record is damaged.
    """
    file = output / INIT_FROM
    if not file.is_file():
        return None
    try:
        return as_path(json.loads(file.read_text())["run"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged; train into another --output") from None


def open_warm_start(output: Path, given: Path | None, resume: bool) -> WarmStart | None:
    """What a run starts from: what is given, or what the run that is resumed has recorded.

    Args:
        output: Run folder.
        given: Value of --init_from.
        resume: Whether the run is resumed, if there is one.

    Raises:
        UserError: It cannot be read, or the run that is resumed has started from something else.
    """
    recorded = recorded_run(output) if resume else None
    if (run := given or recorded) is None:
        return None
    if resume and recorded is None and (output / "config.yaml").is_file():
        raise UserError(f"{output} was started without --init_from; resume it without, or give another --output")
    start = WarmStart.open(run)
    if recorded is not None:
        start.check_recorded(output)
    return start


def _check_settings(model: str, stage: StageName, trained: Config, config: Config, bundle: Path) -> None:
    same = inherited_settings("sbr" if model == "sbr" else stage, trained)
    if model == "llm_text":
        same |= {one.name: one.value for one in settings(trained) if one.name in _TEXT_ENCODER_SETTINGS}
    now = {one.name: one.value for one in settings(config)}
    for name, value in same.items():
        if now[name] != value:
            raise UserError(
                f"setting {name} is {now[name]}, but {bundle} was trained with {value}; give the same setting, or "
                "train without --init_from"
            )
