"""A prepared data set and a run with exported untrained models, made once and shared by the tests that read them."""

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from llmgr_rec.config import Config
from llmgr_rec.config_file import save_config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.distributed.process_group import World
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from tests.data.prepare_inputs import edit_manifest

ONE_RANK = World.alone()
NUM_ITEMS = 60


@dataclass(frozen=True)
class SmallRun:
    """Where the shared files are; tests must not write to them."""

    dataset: Dataset
    run: Path

    @property
    def catalog(self) -> Catalog:
        return Catalog.load(self.dataset.path)


def config() -> Config:
    """Settings of a run of all stages on a tiny language model, with the shipped templates and nothing to select."""
    settings = Config()
    settings.tables.dim = 16
    settings.tables.knn_smoothing = [0.0]
    settings.encoder.dropout = 0.2
    settings.llm.name_or_path = "random-tiny"
    settings.llm.num_layers = 1
    settings.llm.lora_rank = 2
    settings.prompt.templates = "default"
    settings.prompt.one_pass = False
    settings.prompt.max_text_tokens = 4
    settings.head.separate_loss = False
    settings.align.epochs = settings.behave.epochs = 1
    settings.blend.neighbors = []
    settings.runtime.eval_batch_size = 32
    settings.runtime.device = "cpu"
    settings.runtime.threads_per_rank = 1
    return settings


def write_log(folder: Path, seed: int = 0, first_item: int = 0) -> tuple[Path, Path]:
    """Clicks of a slowly drifting random walk, so that neighbors in the catalog occur together, and their items."""
    rng = np.random.default_rng(seed)
    users, items, times = [], [], []
    for user in range(90):
        start = int(rng.integers(NUM_ITEMS))
        for click in range(int(rng.integers(3, 12))):
            users.append(f"u{user}")
            items.append(f"i{first_item + (start + 2 * click + int(rng.integers(3))) % NUM_ITEMS}")
            times.append(1000 * user + click)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), folder / "interactions.parquet")
    ids = [f"i{first_item + item}" for item in range(NUM_ITEMS)]
    titles = [f"<b>Thing</b> & {item}" for item in ids]
    categories = [f"Kind {number % 4}" for number in range(NUM_ITEMS)]
    pq.write_table(pa.table({"item_id": ids, "title": titles, "category": categories}), folder / "items.parquet")
    return folder / "interactions.parquet", folder / "items.parquet"


def prepare_small(folder: Path, seed: int = 0, first_item: int = 0) -> Dataset:
    """A prepared data set of the log of `write_log`."""
    interactions, items = write_log(folder / "raw", seed, first_item)
    prepare_dataset(
        PrepareSettings(
            interactions=str(interactions),
            items=str(items),
            output=str(folder / "dataset"),
            min_interactions=0,
            threads=1,
        )
    )
    return Dataset(folder / "dataset")


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="llmgr-small-run-")


def clean_up() -> None:
    """Deletes what the functions below have made."""
    if _folder.cache_info().currsize:
        _folder().cleanup()


@cache
def small_run() -> SmallRun:
    """The shared data set and run, with exports of stage sbr and of stage behave."""
    folder = Path(_folder().name)
    dataset = prepare_small(folder)
    catalog = Catalog.load(dataset.path)
    settings = config()
    factory, cpu = ModelFactory(), torch.device("cpu")
    spec = factory.spec("behave", settings, catalog)
    model = factory.build(spec, factory.language_parts(spec, catalog, cpu), cpu)
    init_tables(model, 1, 0.5)
    run = folder / "run"
    run.mkdir()
    save_config(settings, run / "config.yaml")
    export_bundle(model.recommender, "sbr", settings, catalog, run / "export" / "sbr", ONE_RANK)
    export_bundle(model, "behave", settings, catalog, run / "export" / "behave", ONE_RANK)
    return SmallRun(dataset, run)


@cache
def without_repeats() -> Dataset:
    """The shared data set again, but that its manifest says that repeats are excluded."""
    folder = Path(_folder().name) / "without-repeats"
    shutil.copytree(small_run().dataset.path, folder)
    edit_manifest(folder, lambda values: values.update(repeats="exclude"))
    return Dataset(folder)


def run_with(folder: Path, *stages: str) -> Path:
    """A copy of the shared run with some of its stages only."""
    source = small_run().run
    (folder / "export").mkdir(parents=True)
    shutil.copy(source / "config.yaml", folder)
    for stage in stages:
        shutil.copytree(source / "export" / stage, folder / "export" / stage)
    return folder
