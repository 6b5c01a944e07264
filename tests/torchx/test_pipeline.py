"""The driver: order of the steps, what it skips, what it refuses, and how it stops."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.results import write_metrics
from torchx_components import pipeline

STEP_NAMES = ["prepare", "train", "evaluate", "score", "report"]
ROOT = Path(__file__).parents[2]


def make_input(folder: Path) -> Path:
    folder.mkdir()
    for name in pipeline.INPUT_FILES:
        (folder / name).write_text("")
    return folder


class FakeSteps:
    """Plays all commands: records them and writes their results."""

    def __init__(self, steps: Sequence[pipeline.Step], failing: str = "") -> None:
        self.steps = {shlex.join(step.command): step for step in steps}
        self.failing = failing
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str]) -> int:
        step = self.steps[shlex.join(command)]
        self.ran.append(step.name)
        if step.name == self.failing:
            return 3
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.result.write_text("")
        return 0


def test_steps_run_in_order_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = pipeline.plan_steps(tmp_path / "data", tmp_path / "out", "quickstart", 2)
    fake = FakeSteps(steps)
    pipeline.run_steps(steps, fake)
    assert fake.ran == STEP_NAMES
    said = capsys.readouterr().out
    assert f"$ python -m llmgr_rec.prepare --interactions {tmp_path / 'data' / 'interactions.parquet'}" in said
    again = FakeSteps(steps)
    pipeline.run_steps(steps, again)
    assert again.ran == []


@pytest.mark.parametrize(
    ("config", "further", "stage"),
    [
        ("quickstart", [], "behave"),
        ("default", [], "sbr"),
        ("llm_text", [], "llm_text"),
        ("quickstart", ["--behave.epochs", "0"], "align"),
        ("quickstart", ["--stage", "sbr"], "sbr"),
    ],
)
def test_training_is_complete_with_the_last_stage_of_the_settings(
    tmp_path: Path, config: str, further: list[str], stage: str
) -> None:
    train = pipeline.plan_steps(tmp_path, tmp_path, config, 2, further)[1]
    assert train.name == "train"
    assert train.result == tmp_path / "run" / "export" / stage / "bundle.json"


def test_a_mistake_in_settings_is_reported_before_anything_is_made(tmp_path: Path) -> None:
    data, out = make_input(tmp_path / "data"), tmp_path / "out"
    with pytest.raises(UserError, match="did you mean default"):
        pipeline.main(["--data", str(data), "--output", str(out), "--config", "defalt"])
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"RUN .*notes\.txt is a file; give the path of a folder"):
        pipeline.claim_output(tmp_path / "notes.txt" / "out", {"data": "a"})


def test_where_the_trainer_works_is_not_for_its_arguments_to_say(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are set by this command; remove them after --"):
        pipeline.plan_steps(None, tmp_path, "quickstart", 2, ["--output", "elsewhere"])


def test_settings_that_were_edited_are_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, settings = make_input(tmp_path / "data"), tmp_path / "c.yaml"
    settings.write_text("seed: 0\n")
    words = ["--data", str(data), "--output", str(tmp_path / "out"), "--config", str(settings)]

    def no_step(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_steps", no_step)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pipeline.main(words)
    settings.write_text("seed: 7\n")
    with pytest.raises(UserError, match=r"was made with config .*c\.yaml \(\w{12}\), not "):
        pipeline.main(words)


def test_it_goes_on_after_the_step_that_failed(tmp_path: Path) -> None:
    steps = pipeline.plan_steps(None, tmp_path, "quickstart", 2)
    with pytest.raises(UserError, match="step evaluate failed with exit code 3"):
        pipeline.run_steps(steps, FakeSteps(steps, failing="evaluate"))
    fake = FakeSteps(steps)
    pipeline.run_steps(steps, fake)
    assert fake.ran == ["evaluate", "score", "report"]


def test_a_step_without_its_result_has_failed(tmp_path: Path) -> None:
    steps = pipeline.plan_steps(tmp_path, tmp_path, "quickstart", 2)
    with pytest.raises(UserError, match=r"step prepare did not write .*manifest\.json"):
        pipeline.run_steps(steps, lambda command: 0)


def test_without_data_it_makes_movielens(tmp_path: Path) -> None:
    first, second = pipeline.plan_steps(None, tmp_path, "quickstart", 2)[:2]
    assert first.command == ["python", "-m", "datagen.movielens", "--output", str(tmp_path / "raw")]
    assert str(tmp_path / "raw" / "items.parquet") in second.command


def test_training_is_resumed_when_it_had_started(tmp_path: Path) -> None:
    def training() -> list[str]:
        steps = pipeline.plan_steps(tmp_path, tmp_path, "quickstart", 2, ["--seed", "3"])
        return next(step.command for step in steps if step.name == "train")

    assert training()[:8] == ["torchx", "run", "-s", "local_cwd", "dist.ddp", "-j", "1x2", "-m"]
    assert training()[-2:] == ["--seed", "3"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert training()[-1] == "--resume"


def test_a_folder_belongs_to_one_data_set_and_recipe(tmp_path: Path) -> None:
    pipeline.claim_output(tmp_path / "out", {"data": "a", "config": "quickstart"})
    pipeline.claim_output(tmp_path / "out", {"data": "a", "config": "quickstart"})
    with pytest.raises(UserError, match="was made with data a, not b"):
        pipeline.claim_output(tmp_path / "out", {"data": "b", "config": "quickstart"})


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="was not made by this command"):
        pipeline.claim_output(tmp_path, {"data": "a"})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_missing_input_is_reported_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"interactions\.parquet does not exist"):
        pipeline.main(["--data", str(tmp_path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_it_ends_with_the_table_and_the_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_input(tmp_path / "data"), tmp_path / "out"
    values = {f"{metric}@{k}": 0.25 for metric in ("hr", "ndcg", "mrr") for k in (5, 10, 20)}
    steps = pipeline.plan_steps(data, out, "quickstart", 2)
    fake = FakeSteps(steps)

    def run(command: Sequence[str], environment: dict[str, str]) -> int:
        code = fake(command)
        if fake.ran[-1] == "evaluate":
            content = {"test": {"sbr": values, "llmgr": values}, "count": 1234, "protocol": "by this rule"}
            content["blends"] = {"llmgr": {"item_knn": 4.0}}
            write_metrics(out / "run" / "metrics.json", content)
        return code

    monkeypatch.setattr(pipeline, "run_command", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    pipeline.main(["--data", str(data), "--output", str(out)])
    said = capsys.readouterr().out
    assert "0.2500" in said
    assert "\nLLMGR with item_knn x 4\n" in said
    assert "1,234 test sessions, by this rule" in said
    assert str(out / "report" / "index.html") in said
    assert json.loads((out / "pipeline.json").read_text())["data"].startswith(f"{data} (")


def test_children_use_this_interpreters_programs() -> None:
    environment = pipeline.child_environment(ranks=2)
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert int(environment["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_the_child_is_stopped_with_the_driver(tmp_path: Path, number: int, code: int) -> None:
    note = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    child = f"import os, pathlib, time; {note}; time.sleep(60)"
    program = f"""
import sys
from llmgr_rec.cli import run_cli
from torchx_components import pipeline
run_cli(lambda argv: pipeline.run_command([sys.executable, "-c", {child!r}], {{}}))
"""
    driver = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(number)
    assert driver.wait(60) == code
    child_state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    while child_state.exists() and ") Z " not in child_state.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
