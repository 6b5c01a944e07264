"""A language model cut over the ranks trains, stores and leaves behind what one does that is whole on each."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmgr_rec.config import Config
from llmgr_rec.distributed.fsdp import is_sharded
from llmgr_rec.distributed.process_group import World
from llmgr_rec.training import stages
from llmgr_rec.training.metrics_logger import MetricsLogger
from tests.ranks import run_on_ranks
from tests.training.exported import Exported
from tests.training.small_training import numbers, records, small_config, train
from tests.training.test_resume import Interrupted, stop_at

pytestmark = pytest.mark.dist

STEPS, STOP_AT, CHECKPOINT_EVERY = 5, 4, 3


def base_config(folder: Path) -> Config:
    config = small_config(folder / "prompts.yaml")
    config.sbr.max_steps, config.align.max_steps, config.behave.max_steps = 2, STEPS, STEPS
    config.llm.num_layers = 2
    config.runtime.checkpoint_every = CHECKPOINT_EVERY
    return config


def lora(folder: Path) -> Config:
    config = base_config(folder)
    # Clipped in every step.
    config.optimizer.clip_norm = 0.01
    return config


def bfloat16(folder: Path) -> Config:
    """A base in another number format than its LoRA, and layers computed again."""
    config = base_config(folder)
    config.llm.dtype = "bfloat16"
    config.llm.recompute = True
    config.align.epochs = 0
    return config


def reader(folder: Path) -> Config:
    """Its vectors lie on one of two ranks, which yet have to make them together."""
    config = base_config(folder)
    config.text = replace(
        config.text, reader="language_model", epochs=1, dim=8, clicks=3, dropout=0.0, max_steps=STEPS, clip_norm=0.01
    )
    config.tables.sharding = "table_wise"
    config.llm.recompute = True
    config.prompt.max_text_tokens = 24
    config.align.epochs = config.behave.epochs = 0
    return config


CASES = {"lora": lora, "bfloat16": bfloat16, "reader": reader}
# The stage that is interrupted.
STOPS = {"lora": "behave", "reader": "text"}


def train_cases(world: World, folder: str, name: str, cut: bool, cases: list[str]) -> dict[str, bool]:
    """Trains, or goes on with, cases; returns by case whether the last stage's language model was cut."""
    was_cut, export = {}, stages.export_bundle
    for case in cases:

        def watched_export(model: torch.nn.Module, *rest: object, case: str = case) -> None:
            was_cut[case] = is_sharded(model)
            export(model, *rest)  # type: ignore[arg-type]

        stages.export_bundle = watched_export  # type: ignore[assignment]
        config, run = CASES[case](Path(folder)), Path(folder, f"{name}-{case}")
        config.llm.fsdp = cut
        if world.rank == 0:
            run.mkdir(exist_ok=True)
        train(world, config, run, Path(folder, "dataset"), resume=True)
    return was_cut


def stop(world: World, folder: str, name: str, cut: bool) -> None:
    """Trains cases up to the middle of a stage, past a checkpoint."""
    write = MetricsLogger.write
    for case, stage in STOPS.items():
        MetricsLogger.write = stop_at(stage, STOP_AT, write)  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            train_cases(world, folder, name, cut, [case])
        MetricsLogger.write = write  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """Runs `one` on one rank, `whole` and `cut` on two."""
    folder = tmp_path_factory.mktemp("decoder_shards")
    (folder / "dataset").symlink_to(small_dataset)
    small_config(folder / "prompts.yaml")
    assert not any(run_on_ranks(train_cases, 1, str(folder), "one", True, list(CASES))[0].values())
    assert not any(run_on_ranks(train_cases, 2, str(folder), "whole", False, list(CASES))[0].values())
    assert all(run_on_ranks(train_cases, 2, str(folder), "cut", True, list(CASES))[0].values())
    return folder


# In bfloat16 a reading is rounded by what shares its batch.
@pytest.mark.parametrize(
    ("case", "other"),
    [("lora", "one"), ("lora", "whole"), ("bfloat16", "whole"), ("reader", "one"), ("reader", "whole")],
)
def test_it_computes_what_a_whole_one_does(folder: Path, case: str, other: str) -> None:
    assert_close(folder / f"cut-{case}", folder / f"{other}-{case}")


def assert_close(run: Path, other: Path) -> None:
    found, expected = numbers(run), numbers(other)
    assert found.keys() == expected.keys()
    worst = max(expected, key=lambda name: abs(found[name] - expected[name]))
    assert found[worst] == pytest.approx(expected[worst], abs=1e-5), worst
    for stage in sorted((other / "export").iterdir()):
        for mine, theirs in zip(tensors(run / "export" / stage.name), tensors(stage), strict=True):
            assert mine.keys() == theirs.keys()
            for name in theirs:
                torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=0, msg=f"{stage.name} {name}")


def tensors(bundle: Path) -> list[dict[str, Tensor]]:
    found = Exported.read(bundle)
    return [found.tables, found.recommender, found.language, found.lora]


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Callable[[str, str], str]:
    """Copies interrupted runs, with their language models cut or whole, under a new name."""
    run_on_ranks(stop, 2, str(folder), "stopped-cut", True)
    run_on_ranks(stop, 2, str(folder), "stopped-whole", False)

    def copied(kind: str, name: str) -> str:
        for case in STOPS:
            shutil.copytree(folder / f"stopped-{kind}-{case}", folder / f"{name}-{case}")
        return name

    return copied


def test_it_goes_on_where_it_stopped(folder: Path, stopped: Callable[[str, str], str]) -> None:
    run_on_ranks(train_cases, 2, str(folder), stopped("cut", "resumed"), True, list(STOPS))
    for case in STOPS:
        assert records(folder / f"resumed-{case}") == records(folder / f"cut-{case}")
        resumed, whole = (
            {path.name: path.read_bytes() for path in (folder / f"{name}-{case}" / "export").rglob("*.safetensors")}
            for name in ("resumed", "cut")
        )
        assert resumed == whole


@pytest.mark.parametrize(("kind", "cut", "ranks"), [("cut", False, 1), ("cut", False, 2), ("whole", True, 3)])
def test_it_goes_on_whole_or_cut_at_any_number_of_ranks(
    folder: Path, stopped: Callable[[str, str], str], kind: str, cut: bool, ranks: int
) -> None:
    name = stopped(kind, f"{kind}-{cut}-{ranks}")
    run_on_ranks(train_cases, ranks, str(folder), name, cut, list(STOPS))
    for case in STOPS:
        assert_close(folder / f"{name}-{case}", folder / f"whole-{case}")
