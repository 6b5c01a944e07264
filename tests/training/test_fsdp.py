"""A language model that is sharded across ranks trains, stores and exports what one does that is whole on each."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmgr_rec.config import Config, TextEncoderConfig
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
    """A base in another number format than its LoRA, and layers computed again, of parts that are encoded again."""
    config = base_config(folder)
    config.llm.micro_batches = 2
    config.llm.dtype = "bfloat16"
    config.llm.recompute = True
    config.align.epochs = 0
    return config


def llm_text(folder: Path) -> Config:
    """Item vectors are on one of two ranks, but both have to compute them together."""
    config = base_config(folder)
    config.llm_text.epochs, config.llm_text.max_steps = 1, STEPS
    config.text_encoder = TextEncoderConfig(dim=8, max_clicks=3, dropout=0.0)
    config.optimizer.clip_norm = 0.01
    config.tables.sharding = "table_wise"
    config.llm.recompute = True
    config.prompt.max_text_tokens = 24
    config.align.epochs = config.behave.epochs = 0
    return config


CASES = {"lora": lora, "bfloat16": bfloat16, "llm_text": llm_text}
# The stage that is interrupted.
STOPS = {"lora": "behave", "llm_text": "llm_text"}


def train_cases(world: World, folder: str, name: str, sharded: bool, cases: list[str]) -> dict[str, bool]:
    """Trains, or goes on with, cases; returns by case whether the last stage's language model was sharded."""
    was_sharded, export = {}, stages.export_bundle
    for case in cases:

        def watched_export(model: torch.nn.Module, *rest: object, case: str = case) -> None:
            was_sharded[case] = is_sharded(model)
            export(model, *rest)  # type: ignore[arg-type]

        stages.export_bundle = watched_export  # type: ignore[assignment]
        config, run = CASES[case](Path(folder)), Path(folder, f"{name}-{case}")
        config.llm.fsdp = sharded
        if case == "lora" and name != "one":
            # The run that the others are compared with encodes its batches at once.
            config.llm.micro_batches = 3
        if world.rank == 0:
            run.mkdir(exist_ok=True)
        train(world, config, run, Path(folder, "dataset"), resume=True)
    return was_sharded


def stop(world: World, folder: str, name: str, sharded: bool) -> None:
    """Trains cases up to the middle of a stage, past a checkpoint."""
    write = MetricsLogger.write
    for case, stage in STOPS.items():
        MetricsLogger.write = stop_at(stage, STOP_AT, write)  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            train_cases(world, folder, name, sharded, [case])
        MetricsLogger.write = write  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """Runs `one` on one rank, `whole` and `sharded` on two."""
    folder = tmp_path_factory.mktemp("fsdp")
    (folder / "dataset").symlink_to(small_dataset)
    small_config(folder / "prompts.yaml")
    assert not any(run_on_ranks(train_cases, 1, str(folder), "one", True, list(CASES))[0].values())
    assert not any(run_on_ranks(train_cases, 2, str(folder), "whole", False, list(CASES))[0].values())
    assert all(run_on_ranks(train_cases, 2, str(folder), "sharded", True, list(CASES))[0].values())
    return folder


# In bfloat16 the rounding of a hidden state depends on what shares its batch.
@pytest.mark.parametrize(
    ("case", "other"),
    [("lora", "one"), ("lora", "whole"), ("bfloat16", "whole"), ("llm_text", "one"), ("llm_text", "whole")],
)
def test_it_computes_what_a_whole_one_does(folder: Path, case: str, other: str) -> None:
    assert_close(folder / f"sharded-{case}", folder / f"{other}-{case}")


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
    """Copies interrupted runs, with their language models sharded or whole, under a new name."""
    run_on_ranks(stop, 2, str(folder), "stopped-sharded", True)
    run_on_ranks(stop, 2, str(folder), "stopped-whole", False)

    def copied(kind: str, name: str) -> str:
        for case in STOPS:
            shutil.copytree(folder / f"stopped-{kind}-{case}", folder / f"{name}-{case}")
        return name

    return copied


def test_it_goes_on_where_it_stopped(folder: Path, stopped: Callable[[str, str], str]) -> None:
    run_on_ranks(train_cases, 2, str(folder), stopped("sharded", "resumed"), True, list(STOPS))
    for case in STOPS:
        assert records(folder / f"resumed-{case}") == records(folder / f"sharded-{case}")
        resumed, whole = (
            {path.name: path.read_bytes() for path in (folder / f"{name}-{case}" / "export").rglob("*.safetensors")}
            for name in ("resumed", "sharded")
        )
        assert resumed == whole


@pytest.mark.parametrize(
    ("kind", "sharded", "ranks"), [("sharded", False, 1), ("sharded", False, 2), ("whole", True, 3)]
)
def test_it_goes_on_whole_or_sharded_at_any_number_of_ranks(
    folder: Path, stopped: Callable[[str, str], str], kind: str, sharded: bool, ranks: int
) -> None:
    name = stopped(kind, f"{kind}-{sharded}-{ranks}")
    run_on_ranks(train_cases, ranks, str(folder), name, sharded, list(STOPS))
    for case in STOPS:
        assert_close(folder / f"{name}-{case}", folder / f"whole-{case}")
