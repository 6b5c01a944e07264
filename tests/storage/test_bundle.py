"""Bundles: plain torch loads what was trained on several ranks, without pickles, and no table is on disk twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmgr_rec.config import Config, LLMConfig, PromptConfig, StageName, TablesConfig
from llmgr_rec.data.batch import RawSessions, SessionBatch
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.collate import Collator
from llmgr_rec.data.dataset import Manifest
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.errors import UserError
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.bundle import load_bundle, load_weights
from llmgr_rec.storage.bundle_export import export_bundle
from llmgr_rec.storage.bundle_index import is_complete, latest_bundle, read_index, resolve_bundle
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables
from tests.modules.random_weights import randomize_dense_weights
from tests.ranks import run_on_ranks
from tests.sharded_bundles import sharded_bundles

NUM_ITEMS = 37
CPU = torch.device("cpu")


def config() -> Config:
    return Config(
        tables=TablesConfig(dim=16),
        llm=LLMConfig(name_or_path="random-tiny", dtype="float32", lora_rank=2),
        prompt=PromptConfig(templates="default", text_items=1, max_text_tokens=16),
    )


def build(
    stage: StageName, catalog: Catalog, settings: Config, tables_device: str = "cpu"
) -> SessionRecommender | LLMGR:
    factory = ModelFactory()
    spec = factory.spec(stage, settings, catalog)
    return factory.build(spec, factory.language_parts(spec, catalog, CPU), tables_device).eval()


def collator(stage: StageName, catalog: Catalog) -> Collator:
    factory = ModelFactory()
    return factory.collator(factory.spec(stage, config(), catalog), catalog, "rank")


def write_catalog(folder: Path) -> None:
    folder.mkdir()
    table = {
        "index": pa.array(range(NUM_ITEMS), pa.int64()),
        "item_id": [f"item-{index}" for index in range(NUM_ITEMS)],
        "title": [f"Thing {index}" for index in range(NUM_ITEMS)],
        "category": pa.array([None] * NUM_ITEMS, pa.string()),
        "brand": pa.array([None] * NUM_ITEMS, pa.string()),
        "description": pa.array([None] * NUM_ITEMS, pa.string()),
        "train_count": pa.array([1] * NUM_ITEMS, pa.int64()),
        "category_ids": pa.array([[index % 5] for index in range(NUM_ITEMS)], pa.list_(pa.int64())),
        "brand_ids": pa.array([[]] * NUM_ITEMS, pa.list_(pa.int64())),
    }
    pq.write_table(pa.table(table), folder / "items.parquet")


def sessions(catalog: Catalog) -> SessionBatch:
    raw = RawSessions(
        items_L=torch.tensor([3, 5, 3, 9, 36, 0, 1, 2]),
        offsets_B1=torch.tensor([0, 4, 5, 8]),
        targets_B=torch.tensor([1, 2, 3]),
        weights_B=torch.ones(3),
        rows_B=torch.arange(3),
        global_size=3,
    )
    return collator("align", catalog)(raw)


def manifest() -> Manifest:
    """Of training sessions that repeat no click."""
    return Manifest(
        num_items=NUM_ITEMS,
        num_sessions={},
        num_examples={},
        split="temporal",
        max_length=50,
        min_interactions=0,
        prefix_augmentation=[],
        features={},
        has_text=True,
        catalog_hash="",
        files={},
        repeats="exclude",
    )


@torch.no_grad()
def answers(model: SessionRecommender | LLMGR, catalog: Catalog) -> tuple[Tensor, Tensor]:
    """Queries of some sessions and vectors of all items."""
    batch = sessions(catalog)
    queries = model(batch) if isinstance(model, LLMGR) else model.queries(batch)
    return queries, model.item_vectors(collator("sbr", catalog).item_features(torch.arange(NUM_ITEMS)))


def export_rank(world: World, dataset: str, run: str) -> list[tuple[Tensor, Tensor]]:
    """Exports a recommender, then a language stage that starts from it; returns their answers."""
    catalog = Catalog.load(dataset)
    found = []
    recommender = build("sbr", catalog, config(), "meta")
    shard(recommender, config().tables, world, lambda name: True)
    init_tables(recommender, 5, 0.1)
    randomize_dense_weights(recommender)
    found.append(answers(recommender, catalog))
    export_bundle(recommender, "sbr", config(), catalog, Path(run, "export/sbr"), world)
    llmgr = build("align", catalog, config(), "meta")
    model = shard(llmgr, config().tables, world, lambda name: False)
    init_tables(llmgr, 77, 0.1)
    randomize_dense_weights(llmgr)
    left = load_weights(model, latest_bundle(Path(run, "export")))
    assert "text_tables.embedding_bags.item_text.weight" in left
    assert not any("recommender" in name for name in left), left
    found.append(answers(llmgr, catalog))
    export_bundle(llmgr, "align", config(), catalog, Path(run, "export/align"), world, manifest())
    with pytest.raises(UserError, match="already"):
        export_bundle(llmgr, "align", config(), catalog, Path(run, "export/align"), world)
    return found


def load_rank(world: World, run: str) -> list[tuple[Tensor, Tensor]]:
    with sharded_bundles():
        bundles = [load_bundle(f"{run}/export/{stage}", world) for stage in ("sbr", "align")]
    return [answers(bundle.model, bundle.catalog) for bundle in bundles]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Tensor, Tensor]]]:
    """A run exported by two ranks, and the answers of the models that were exported."""
    folder = tmp_path_factory.mktemp("bundle")
    write_catalog(folder / "dataset")
    results = run_on_ranks(export_rank, 2, str(folder / "dataset"), str(folder / "run"))
    for first, second in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)
    return folder / "run", results[0]


@pytest.mark.dist
def test_plain_torch_gives_the_answers_of_the_sharded_model(exported: tuple[Path, list[tuple[Tensor, Tensor]]]) -> None:
    run, expected = exported
    assert not dist.is_initialized()
    for stage, answer in zip(("sbr", "align"), expected, strict=True):
        bundle = load_bundle(run / "export" / stage)
        assert bundle.stage == stage
        torch.testing.assert_close(answers(bundle.model, bundle.catalog), answer, atol=1e-5, rtol=1e-5)
        assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
    assert load_bundle(run).stage == "align", "a run means its furthest bundle"
    assert resolve_bundle(run / "export") == run / "export/align"
    assert not dist.is_initialized()


@pytest.mark.dist
def test_another_number_of_ranks_loads_it_too(exported: tuple[Path, list[tuple[Tensor, Tensor]]]) -> None:
    run, expected = exported
    for loaded in run_on_ranks(load_rank, 3, str(run)):
        torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.dist
def test_files(exported: tuple[Path, list[tuple[Tensor, Tensor]]]) -> None:
    run, _ = exported
    sbr, align = run / "export/sbr", run / "export/align"
    names = {str(path.relative_to(align)) for path in align.rglob("*") if path.is_file()}
    tables = {f"tables/{table}-r0-c{col}.safetensors" for table in ("item_id", "category") for col in (0, 8)}
    assert names == tables | {
        "tables/item_text-r0-c0.safetensors",
        "tables/item_text-r0-c32.safetensors",
        "bundle.json",
        "config.yaml",
        "prompts.yaml",
        "items.parquet",
        "recommender.safetensors",
        "llmgr.safetensors",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    }
    for name in tables:
        assert (sbr / name).stat().st_ino == (align / name).stat().st_ino, f"{name} is on disk twice"
    modes = {path.stat().st_mode for path in align.rglob("*") if path.is_file()}
    assert len(modes) == 1, "some files may be read by their owner only"
    index = read_index(align)
    assert index.language_model["name"] == "random-tiny"
    assert index.dims == {"d1": 16, "d2": 64}
    assert [(bundle.repeats, bundle.max_length) for bundle in (read_index(sbr), index)] == [
        ("allow", 0),
        ("exclude", 50),
    ]
    assert not list((run / "export").glob("*.tmp"))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bundle.json", "no exported model"),
        ("recommender.safetensors", "recommender.safetensors has 0 of"),
        ("tables/item_id-r0-c8.safetensors", "item_id-r0-c8.safetensors is missing"),
    ],
)
def test_a_damaged_bundle_is_refused(
    exported: tuple[Path, list[tuple[Tensor, Tensor]]], damage: str, message: str, tmp_path: Path
) -> None:
    shutil.copytree(exported[0] / "export/align", tmp_path / "export/align")
    (tmp_path / "export/align" / damage).unlink()
    with pytest.raises(UserError, match=message):
        load_bundle(tmp_path)


@pytest.mark.dist
def test_foreign_bundles_are_refused(exported: tuple[Path, list[tuple[Tensor, Tensor]]], tmp_path: Path) -> None:
    shutil.copytree(exported[0] / "export/align", tmp_path / "align")
    index = json.loads((tmp_path / "align/bundle.json").read_text())
    index["checksum"] = None
    changes: list[tuple[dict[str, Any], str]] = [
        ({"format_version": 9}, "format version 9"),
        # Of before: its neighbors stood in a file of another name, without which it would rank worse.
        ({"format_version": 1}, "format version 1, this version of llmgr_rec reads 2; train the stage again"),
        ({"catalog_hash": "other"}, "another catalog"),
        ({"language_model": {"name": "random-tiny", "weights_hash": "other"}}, "other weights"),
        ({"surplus": 1}, "is damaged"),
        ({"max_length": -5}, "is damaged \\(max_length is -5"),
    ]
    for change, message in changes:
        (tmp_path / "align/bundle.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(UserError, match=message):
            load_bundle(tmp_path / "align")
    optional = ("repeats", "max_length", "consecutive_repeats")
    former = {name: value for name, value in index.items() if name not in optional}
    (tmp_path / "align/bundle.json").write_text(json.dumps(former))
    assert read_index(tmp_path / "align").repeats == "allow", "a bundle of before reads as one with repeats"
    wider = Config(tables=TablesConfig(dim=32), llm=config().llm)
    model = build("sbr", Catalog.load(exported[0] / "export/sbr"), wider)
    with pytest.raises(UserError, match=r"37, 16\) rows and columns in table item_id, the model \(37, 32\)"):
        load_weights(model, exported[0] / "export/sbr")


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_bundle(tmp_path / "nothing")
    (tmp_path / "export/sbr.tmp").mkdir(parents=True)
    (tmp_path / "export/sbr.tmp/bundle.json").write_text("{}")
    assert not is_complete(tmp_path / "export/sbr.tmp")
    with pytest.raises(UserError, match="no exported model"):
        load_bundle(tmp_path)
    (tmp_path / "fitted" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match=f"fitted has no exported model; give {tmp_path}/fitted/run"):
        resolve_bundle(tmp_path / "fitted")
