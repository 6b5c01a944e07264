"""Stages compute the same on one rank and on two, and change only the parameters that they train."""

import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from llmgr_rec.config import Config, StageName, TextEncoderConfig
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.distributed.process_group import World
from llmgr_rec.modules.llmgr import LLMGR
from llmgr_rec.modules.recommender import SessionRecommender
from llmgr_rec.storage.bundle_export import dense_tensors, language_tensors
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.table_io import init_tables, local_shards
from llmgr_rec.training import loop, stages
from tests.ranks import run_on_ranks
from tests.training.exported import Exported
from tests.training.small_training import numbers, records, small_config, train

pytestmark = pytest.mark.dist

# Steps of the stages with a language model: whole batches, so that each rank has whole contrastive groups.
STEPS = 5
CPU = torch.device("cpu")
# Stored with the weights, but constant.
CONSTANTS = {"adapter.embedding_norm"}


def base_config(folder: Path) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.align.max_steps = config.behave.max_steps = STEPS
    return config


def adagrad(folder: Path) -> Config:
    """Stages sbr, align and behave."""
    return base_config(folder)


def adam(folder: Path) -> Config:
    config = base_config(folder)
    config.tables = replace(config.tables, optimizer="adam", lr=0.01)
    config.prompt.node_source = "encoder"
    config.head.name = "linear"
    return config


def sampled(folder: Path) -> Config:
    """Sampled softmax losses, and item text in the prompt."""
    config = base_config(folder)
    config.loss.full_softmax_max_items = config.loss.max_cached_items = 20
    config.loss.num_negatives = 16
    config.encoder.name = "srgnn"
    config.align.epochs = 0
    config.prompt.text_items = 2
    config.prompt.templates = str(folder / "prompts-with-text.yaml")
    return config


def one_pass(folder: Path) -> Config:
    """Stages sbr and behave encode all prefixes of a session in one pass; longer sessions are split."""
    config = base_config(folder)
    config.encoder.name = "sasrec"
    config.align.epochs = 0
    config.prompt.one_pass, config.prompt.max_nodes = True, 2
    config.encoder.one_pass, config.encoder.max_clicks = True, 3
    config.head.separate_loss = True
    return config


def llm_text(folder: Path) -> Config:
    """A language model encodes sessions as text; sessions of more than three clicks are split."""
    config = base_config(folder)
    config.llm_text.epochs, config.llm_text.max_steps = 1, STEPS
    config.text_encoder = TextEncoderConfig(dim=8, max_clicks=3, dropout=0.0, num_negatives=20)
    config.prompt.max_text_tokens = 24
    config.align.epochs = config.behave.epochs = 0
    return config


CASES = {
    "adagrad": adagrad,
    "adam": adam,
    "sampled": sampled,
    "one_pass": one_pass,
    "llm_text": llm_text,
}
SHARDINGS = ("table_wise", "column_wise")


def train_cases(world: World, folder: str, shardings: tuple[str, ...]) -> "Watched":
    """Trains each case under each sharding; returns what only a look into the processes can tell."""
    watched = Watched()
    watched.start()
    for name, case in CASES.items():
        for sharding in shardings:
            config = case(Path(folder))
            config.tables.sharding = sharding  # type: ignore[assignment]
            watched.case = f"{name}-{sharding}"
            run = Path(folder, f"{world.size}-{watched.case}")
            if world.rank == 0:
                run.mkdir()
            train(world, config, run, small_dataset_of(folder))
    return watched


def small_dataset_of(folder: str) -> Path:
    return Path(folder, "dataset")


@dataclass
class Watched:
    """What a look into the processes tells, by "case-sharding stage".

    Args:
        case: The case at hand.
        said: Log lines.
        pipelined: Lookups that each epoch's pipeline moved ahead.
        shards: Table, row and column of each part of a table on this rank.
        base: Tensors of the base language model, and those among them that moved.
    """

    case: str = ""
    said: list[str] = field(default_factory=list)
    pipelined: dict[str, list[int]] = field(default_factory=dict)
    shards: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    base: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def start(self) -> None:
        watch, pipeline, export = self, loop.TrainPipelineSparseDist, stages.export_bundle

        class WatchedPipeline(pipeline):  # type: ignore[misc, valid-type]
            def detach(self) -> Any:
                watch.pipelined.setdefault(watch.case, []).append(len(self._pipelined_modules))
                return super().detach()

        def watched_export(model: Any, stage: str, config: Config, *rest: Any) -> None:
            self.shards[f"{self.case} {stage}"] = [
                (shard.table, shard.row_offset, shard.col_offset) for shard in local_shards(model)
            ]
            if isinstance(model, LLMGR):
                self.base[f"{self.case} {stage}"] = compare_base(model, config)
            export(model, stage, config, *rest)

        listener = logging.Handler()
        listener.emit = lambda record: watch.said.append(f"{watch.case} {record.getMessage()}")  # type: ignore[method-assign]
        logging.getLogger("llmgr_rec").addHandler(listener)
        logging.getLogger("llmgr_rec").setLevel(logging.INFO)
        loop.TrainPipelineSparseDist = WatchedPipeline
        stages.export_bundle = watched_export


def compare_base(model: LLMGR, config: Config) -> tuple[int, list[str]]:
    """Number of the base's tensors, and names of those that are not what is loaded afresh."""
    fresh = ModelFactory().decoder(config, CPU).state_dict()
    trained = {
        name.replace(".base_layer", ""): value
        for name, value in model.language_model.base.state_dict().items()
        if "lora_" not in name
    }
    assert trained.keys() == fresh.keys()
    return len(fresh), [name for name, value in fresh.items() if not torch.equal(value, trained[name])]


@dataclass
class Trained:
    folder: Path
    one: Watched
    two: list[Watched]

    def run(self, size: int, case: str, sharding: str) -> Path:
        # On one rank a table is whole under any sharding.
        return self.folder / f"{size}-{case}-{'column_wise' if size == 1 else sharding}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Trained:
    folder = tmp_path_factory.mktemp("stages")
    (folder / "dataset").symlink_to(small_dataset)
    small_config(folder / "prompts.yaml")
    with_text = (folder / "prompts.yaml").read_text().replace("{graph} =", "{graph} {text} =", 1)
    (folder / "prompts-with-text.yaml").write_text(with_text)
    (one,) = run_on_ranks(train_cases, 1, str(folder), ("column_wise",))
    return Trained(folder, one, run_on_ranks(train_cases, 2, str(folder), SHARDINGS))


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(trained: Trained, case: str, sharding: str) -> None:
    one, two = (numbers(trained.run(size, case, sharding)) for size in (1, 2))
    assert one.keys() == two.keys()
    assert {name.split("/")[0] for name in one if name.endswith("/loss")} == stages_of(case)
    assert any("valid" in name and "ndcg@20" in name for name in one)
    assert not any(name.startswith("align/valid") for name in one), "align trains on another task than the next item"
    worst = max(one, key=lambda name: abs(one[name] - two[name]))
    assert two[worst] == pytest.approx(one[worst], abs=1e-5), worst


def stages_of(case: str) -> set[str]:
    return {
        "adagrad": {"sbr", "align", "behave"},
        "adam": {"sbr", "align", "behave"},
        "sampled": {"sbr", "behave"},
        "one_pass": {"sbr", "behave"},
        "llm_text": {"sbr", "llm_text"},
    }[case]


def test_rank_0_says_what_a_step_and_a_validation_take(trained: Trained) -> None:
    first, second = ([line for line in rank.said if line.startswith("adagrad-column_wise")] for rank in trained.two)
    for stage in stages_of("adagrad"):
        (line,) = [line for line in first if re.search(rf" {stage}: about [0-9.]+ m?s a step, about ", line)]
        step = line[line.index(f"{stage}: ") :]
        later = {"sbr": ", align and behave", "align": "behave"}
        assert re.search(r"a step, about .* for the \d+ left; about .* to the end of the run", step)
        if stage != "behave":
            assert step.endswith(f"{later[stage]}")
        if stage != "sbr":
            assert f"for the {STEPS - 3} left; " in step
    for stage in ("sbr", "behave"):
        starts = [line for line in first if f" {stage} epoch 1: validation starts" in line]
        ends = [line for line in first if re.search(rf" {stage} epoch 1: validation ndcg.*, after \d+ s$", line)]
        assert len(starts) == len(ends) == 1
    assert any("encoding the texts of 64 items" in line for line in first)
    assert any(re.search(r"encoded the texts in \d+ s", line) for line in first)
    assert not [line for line in second if "a step" in line or "validation" in line or "the texts" in line]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_both_ranks_hold_different_parts_of_the_tables(trained: Trained, sharding: str) -> None:
    for stage in ("sbr", "align", "behave"):
        first, second = (set(rank.shards[f"adagrad-{sharding} {stage}"]) for rank in trained.two)
        assert first
        assert second
        assert not first & second
        columns = {column for table, _, column in first | second if table == "item_id"}
        assert columns == ({0, 8} if sharding == "column_wise" else {0})


def test_every_epoch_has_its_lookups_pipelined(trained: Trained) -> None:
    for watched in (trained.one, *trained.two):
        assert {case.rsplit("-", 1)[0] for case in watched.pipelined} == set(CASES)
        assert all(count >= 1 for counts in watched.pipelined.values() for count in counts)


def test_the_base_language_model_never_moves(trained: Trained) -> None:
    for watched in (trained.one, *trained.two):
        assert {name.split()[1] for name in watched.base} == {"align", "behave"}
        assert {moved for count, names in watched.base.values() for moved in names} == set()
        assert all(count > 5 for count, _ in watched.base.values())


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("case", ["adagrad", "adam", "sampled", "one_pass"])
def test_stages_train_their_groups_and_nothing_else(trained: Trained, case: str, sharding: str, size: int) -> None:
    """Gradients of align and behave reach frozen tables and a frozen encoder, which stay bit-identical."""
    run, start = trained.run(size, case, sharding), fresh_tensors(CASES[case](trained.folder), trained.folder)
    before = Exported.read(run / "export" / "sbr")
    assert moved(start.tables, before.tables) == set(start.tables) - {"item_text"}
    assert moved(start.recommender, before.recommender) == set(start.recommender)
    before.language, before.lora = start.language, start.lora
    for stage in ("align", "behave"):
        if stage not in stages_of(case):
            continue
        after = Exported.read(run / "export" / stage)
        assert moved(before.tables, after.tables) == set()
        assert moved(before.recommender, after.recommender) == set()
        assert moved(before.language, after.language) == set(start.language) - CONSTANTS
        assert moved(before.lora, after.lora) == (set() if stage == "align" else set(start.lora))
        before = after


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_text_encoder_trains_as_a_whole_and_exports_its_item_vectors(
    trained: Trained, sharding: str, size: int
) -> None:
    run = trained.run(size, "llm_text", sharding)
    sbr, text = (Exported.read(run / "export" / stage) for stage in ("sbr", "llm_text"))
    assert all(torch.equal(text.recommender[name], values) for name, values in sbr.recommender.items())
    assert all(torch.equal(text.tables[name], values) for name, values in sbr.tables.items())
    model = fresh_model("llm_text", llm_text(trained.folder), trained.folder)
    assert isinstance(model, SessionRecommender)
    encoder = model.text_encoder
    assert encoder is not None
    start = {f"text_encoder.{name}": value.clone() for name, value in encoder.state_dict().items()}
    assert start.keys() == text.recommender.keys() - sbr.recommender.keys()
    assert moved(start, text.recommender) >= {name for name in start if "layers" in name or "projection" in name}
    encoder.load_state_dict({name.removeprefix("text_encoder."): text.recommender[name] for name in start})
    expected = encoder.eval().item_vectors(torch.arange(64)).detach()
    torch.testing.assert_close(text.tables["item_text"], expected, atol=1e-5, rtol=1e-4)
    assert min(losses(run, "llm_text")[1:]) < losses(run, "llm_text")[0]


def losses(run: Path, stage: str) -> list[float]:
    return [values["loss"] for (at, _, split), values in records(run).items() if at == stage and not split]


def fresh_model(stage: StageName, config: Config, folder: Path) -> SessionRecommender | LLMGR:
    """The model that a stage starts from where no earlier one was trained."""
    catalog, factory = Catalog.load(folder / "dataset"), ModelFactory()
    spec = factory.spec(stage, config, catalog)
    return factory.build(spec, factory.language_parts(spec, catalog, CPU), CPU)


def fresh_tensors(config: Config, folder: Path) -> Exported:
    """What a run with these settings starts from."""
    model = fresh_model("behave", config, folder)
    assert isinstance(model, LLMGR)
    init_tables(model, config.seed, config.tables.init_std)
    return Exported(
        {shard.table: shard.tensor.clone() for shard in local_shards(model)},
        dense_tensors(model.recommender),
        language_tensors(model),
        dict(get_peft_model_state_dict(model.language_model.decoder)),
    )


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names whose values are not bit-identical; a tensor that is on one side only does not count."""
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
