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
UNNEEDED = {"accelerate", "duckdb", "matplotlib", "pandas", "peft", "pyarrow.dataset", "tensorboard", "transformers"}
# Only training needs them.
OF_TRAINING = {"torch.distributed.optim"}
# Modules of all packages after each command, in one process. Measured: 2,780, nearly all of torch and TorchRec. Their
# next versions may have more.
MOST_MODULES = 3_300
COMMANDS = """
import importlib, importlib.machinery, json, sys
__spec__ = importlib.machinery.ModuleSpec("llmgr_rec.score", None)
seen = {{}}
def see(name):
    unneeded = {unneeded} if name == "plan" else {unneeded} | {of_training}
    seen[name] = (len(sys.modules), sorted(unneeded & set(sys.modules)))
def command(name, *arguments):
    importlib.import_module("llmgr_rec." + name).main(arguments)
    see(name)
command("score", "--run", "{run}", "--stage", "sbr", "--input", "{data}/test", "--output", "scores")
models = ["--models", "sbr,popularity,item_knn"]
command("evaluate", "--run", "{run}", "--dataset", "{data}", "--output", "metrics.json", *models)
from llmgr_rec import Recommender
rec = Recommender.load("{run}/export/sbr")
rec.recommend([rec.item_ids.to_pylist()[:2]])
see("recommend")
# All that training imports but for the step itself.
command("plan", "--config", "default", "--dataset", "{data}", "--world_size", "1")
print(json.dumps(seen))
"""


def test_a_start_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    small = small_run()
    code = COMMANDS.format(unneeded=UNNEEDED, of_training=OF_TRAINING, run=small.run, data=small.dataset.path)
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
