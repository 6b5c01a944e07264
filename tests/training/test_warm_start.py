"""Training that starts from the models of another run with other items."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmgr_rec.config import Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.side_values import side_values
from llmgr_rec.distributed.process_group import World
from llmgr_rec.distributed.sharding import shard
from llmgr_rec.errors import UserError
from llmgr_rec.storage.bundle_index import read_index
from llmgr_rec.storage.catalog_mapping import CatalogMapping
from llmgr_rec.storage.extended_run import extend_run
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import Shard, init_tables, local_shards
from llmgr_rec.train import main as train
from llmgr_rec.training.preflight import RunRequest, check_run
from llmgr_rec.training.train_run import train_run
from llmgr_rec.training.warm_start import INIT_FROM, WarmStart
from tests.ranks import run_on_ranks
from tests.small_run import config, prepare_small, run_with, small_run

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set with 55 of the 60 items of the small run, and five others."""
    return prepare_small(tmp_path_factory.mktemp("today"), seed=1, first_item=5)


def still(config: Config) -> Config:
    """The settings with one step a stage that changes nothing, so that a run has the weights that it started with."""
    config.tables.lr = 1e-9
    for stage in ("sbr", "align", "behave"):
        config.stage(stage).lr, config.stage(stage).max_steps = 1e-9, 1  # type: ignore[arg-type]
        config.stage(stage).batch_size = 32  # type: ignore[arg-type]
    config.runtime.eval_every = 0
    return config


def request(output: Path, dataset: Dataset, run: Path | None, settings: Config, resume: bool = False) -> RunRequest:
    return RunRequest(settings, dataset.path, output, "all", resume, init_from=run)


def tables(bundle: Path) -> dict[str, Tensor]:
    return {name: load_file(bundle / parts[0].file)["weight"] for name, parts in read_index(bundle).table_files.items()}


def test_all_stages_start_from_the_rows_and_weights_of_the_run(today: Dataset, tmp_path: Path) -> None:
    before, output = small_run().run / "export", tmp_path / "run"
    train_run(request(output, today, small_run().run, still(config())))
    catalog, known = Catalog.of(today), small_run().catalog
    mapping = CatalogMapping.between(known, catalog)
    assert (mapping.num_new, mapping.num_gone) == (5, 5)
    is_known = mapping.known_V >= 0
    for stage in ("sbr", "behave"):
        now, then = tables(output / "export" / stage), tables(before / stage)
        torch.testing.assert_close(
            now["item_id"][is_known], then["item_id"][mapping.known_V[is_known]], atol=1e-6, rtol=0
        )
        ids = {value: row for row, value in enumerate(side_values(known)["category"])}
        rows = [ids[value] for value in side_values(catalog)["category"]]
        torch.testing.assert_close(now["category"], then["category"][rows], atol=1e-6, rtol=0)
        new = (then["item_id"][mapping.neighbors_NK] * mapping.weights_NK.unsqueeze(2)).sum(dim=1)
        torch.testing.assert_close(now["item_id"][mapping.new_items], new, atol=1e-6, rtol=0)
    for file in ("recommender.safetensors", "llmgr.safetensors", "lora/adapter_model.safetensors"):
        now, then = load_file(output / "export/behave" / file), load_file(before / "behave" / file)
        assert now.keys() == then.keys()
        for name in now:
            torch.testing.assert_close(now[name], then[name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_run_with_one_stage_or_a_bundle_of_any_stage_or_an_extended_run_starts_another(
    today: Dataset, tmp_path: Path
) -> None:
    settings = still(config())
    settings.align.epochs = settings.behave.epochs = 0
    extend_run(small_run().run, pq.read_table(today.items_path), "items", tmp_path / "extended")
    starts = [run_with(tmp_path / "sbr", "sbr"), small_run().run / "export/behave", tmp_path / "extended"]
    rows = []
    for place, start in enumerate(starts):
        train_run(request(tmp_path / str(place), today, start, settings))
        rows.append(tables(tmp_path / str(place) / "export/sbr")["item_id"])
    torch.testing.assert_close(rows[0], rows[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[0], rows[2], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda one: setattr(one.tables, "dim", 32),
            r"setting tables.dim is 32, but .*sbr was trained with 16; give the",
        ),
        (lambda one: setattr(one.encoder, "name", "stamp"), r"setting encoder.name is stamp, but .*was trained with"),
        (lambda one: setattr(one.llm, "lora_rank", 4), r"setting llm.lora_rank is 4, but .*behave was trained with 2"),
        (lambda one: setattr(one.head, "name", "linear"), r"setting head.name is linear, but .*was trained with tied"),
    ],
)
def test_other_models_are_refused_by_setting(today: Dataset, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    settings = config()
    change(settings)
    with pytest.raises(UserError, match=message):
        check_run(request(tmp_path / "run", today, small_run().run, settings))


def test_a_run_is_resumed_with_what_it_started_from(today: Dataset, tmp_path: Path) -> None:
    start, other = run_with(tmp_path / "a", "sbr"), run_with(tmp_path / "b", "sbr")
    output, settings = tmp_path / "run", config()
    settings.align.epochs = settings.behave.epochs = 0
    checked = check_run(request(output, today, start, settings, resume=True))
    assert checked.warm_start
    output.mkdir()
    shutil.copy(start / "config.yaml", output)
    with pytest.raises(UserError, match=r"run was started without --init_from; resume it without"):
        check_run(request(output, today, start, settings, resume=True))
    checked.warm_start.record(output)
    again = check_run(request(output, today, None, settings, resume=True)).warm_start
    assert again
    assert again.run == start.resolve()
    with pytest.raises(UserError, match=r"run was started with --init_from .*a, and --init_from .*b is another run or"):
        check_run(request(output, today, other, settings, resume=True))
    (output / INIT_FROM).write_text("{}")
    with pytest.raises(UserError, match=r"init_from\.json is damaged"):
        check_run(request(output, today, None, settings, resume=True))


def test_the_command_takes_the_settings_of_the_run(today: Dataset, tmp_path: Path) -> None:
    start, output = run_with(tmp_path / "a", "sbr"), tmp_path / "run"
    words = ["--init_from", str(start), "--dataset", str(today.path), "--output", str(output), "--sbr.max_steps", "1"]
    train([*words, "--align.epochs", "0", "--behave.epochs", "0"])
    assert "dim: 16" in (output / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"setting encoder\.max_clicks is 7, but .* was trained with 50"):
        train([*words[:4], "--output", str(tmp_path / "other"), "--encoder.max_clicks", "7"])


def started(world: World, run: Path, dataset: Path) -> list[Shard]:
    """The shards of a rank whose tables start from a run."""
    catalog, settings = Catalog.load(dataset), config()
    factory = ModelFactory()
    model = factory.build(factory.spec("sbr", settings, catalog), None, "meta")
    sharded = shard(model, settings.tables, world, lambda name: True)
    init_tables(sharded, 0, 0.1)
    start = WarmStart.open(run)
    start.load_recommender(model, start.mapping(catalog, world))
    return [replace(one, tensor=one.tensor.clone()) for one in local_shards(sharded)]


def test_two_ranks_start_from_the_same_rows_as_one(today: Dataset) -> None:
    mapping = CatalogMapping.between(small_run().catalog, Catalog.of(today))
    before = tables(small_run().run / "export/sbr")
    shards = [one for rank in run_on_ranks(started, 2, small_run().run, today.path) for one in rank]
    assert {(one.table, one.col_offset) for one in shards} == {(name, col) for name in before for col in (0, 8)}
    for one in shards:
        whole = replace(one, tensor=torch.zeros(one.num_rows, one.dim), col_offset=0)
        mapping.fill_shard(whole, lambda rows, _, name=one.table: before[name][rows])
        columns = slice(one.col_offset, one.col_offset + one.tensor.shape[1])
        torch.testing.assert_close(one.tensor, whole.tensor[:, columns])


def test_shards_of_rows_and_columns_are_those_of_the_whole_table(today: Dataset) -> None:
    mapping = CatalogMapping.between(small_run().catalog, Catalog.of(today))
    values_VC = torch.randn(60, 8)
    whole_VC = mapping.item_rows(values_VC)
    for rows, columns in ((range(60), range(4, 8)), (range(20, 45), range(8)), (range(50, 60), range(4))):
        part = Shard("", "item_id", torch.zeros(len(rows), len(columns)), rows.start, columns.start, 60, 8)
        mapping.fill_shard(part, lambda some, cols: values_VC[some][:, cols.start : cols.stop])
        torch.testing.assert_close(part.tensor, whole_VC[rows.start : rows.stop, columns.start : columns.stop])
