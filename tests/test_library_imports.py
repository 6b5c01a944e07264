"""What the commands import before their first batch, counted: the time of a start is that of its imports."""

import gc
import json
import subprocess
import sys
from pathlib import Path

from llmgr_rec.library_imports import collector_paused
from tests.small_run import small_run

ROOT = Path(__file__).parents[1]
# No start without a language model needs them.
UNNEEDED = {"accelerate", "duckdb", "matplotlib", "peft", "tensorboard", "torch.distributed.optim", "transformers"}
# Modules of all packages after each command, in one process. Measured: 3,060, nearly all of torch and TorchRec, and 300
# of pandas where it is installed. Their next versions may have more.
MOST_MODULES = 3_600
COMMANDS = """
import importlib, json, sys
from llmgr_rec import Recommender
seen = {{}}
def see(name):
    seen[name] = (len(sys.modules), sorted({unneeded} & set(sys.modules)))
rec = Recommender.load("{run}/export/sbr")
rec.recommend([rec.item_ids.to_pylist()[:2]])
see("recommend")
run = ["--run", "{run}"]
score = importlib.import_module("llmgr_rec.score").main
score([*run, "--stage", "sbr", "--input", "{data}/test", "--output", "scores"])
see("score")
importlib.import_module("llmgr_rec.evaluate").main(
    [*run, "--dataset", "{data}", "--output", "metrics.json", "--models", "sbr,popularity,item_knn"]
)
see("evaluate")
print(json.dumps(seen))
"""


def test_a_start_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    code = COMMANDS.format(unneeded=UNNEEDED, run=small_run().run, data=small_run().dataset.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for command, (modules, unneeded) in json.loads(done.stdout.splitlines()[-1]).items():
        assert unneeded == [], command
        assert modules < MOST_MODULES, command


def test_the_collector_runs_again_after_imports() -> None:
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled(), "whoever disabled it wants it so"
    finally:
        gc.enable()
