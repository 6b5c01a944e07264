"""Exported programs rank as `Recommender.recommend` does, also in a process without this package."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch._inductor
from torch import Tensor

from llmgr_rec import Recommender, UserError
from llmgr_rec.export import main
from llmgr_rec.scoring.program_export import session_program, write_program
from tests.documented import run_programs
from tests.explanation.explained import recommender
from tests.small_run import small_run

ROOT = Path(__file__).parents[2]
K = 7
SESSIONS = [
    ["i3", "i5", "i5", "i8", "i3", "i9"],
    [],
    ["i1"],
    ["gone", "i2", "gone", "i2", "i4"],
    ["gone"],
    [f"i{item % 13}" for item in range(40)],
]
# One session, one click, no clicks, no sessions.
OTHERS = [[["i7", "i2"]], [["i6"]], [[]], [["gone"], []], []]
Ranked = tuple[Tensor, Tensor, Tensor]

RECOMMENDERS: dict[str, Callable[[], Recommender]] = {
    "plain": recommender,
    "dot": lambda: recommender(score="dot", repeats="exclude"),
    "blend": lambda: recommender(
        item_knn=2.0, text_knn=0.5, repeats="exclude", consecutive_repeats="merge", max_length=9
    ),
}
# Does not find this package, as where it is not installed.
WITHOUT_PACKAGE = """
import runpy, sys
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("llmgr_rec", "torchrec", "fbgemm_gpu"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refused())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def ranked_by(program: Callable[[Tensor, Tensor], Ranked], rec: Recommender, sessions: list[list[str]]) -> Ranked:
    index_of = {item: index for index, item in enumerate(rec.item_ids.to_pylist())}
    clicks = torch.tensor([index_of.get(item, -1) for session in sessions for item in session], dtype=torch.int64)
    return program(clicks, torch.tensor([0, *accumulate(map(len, sessions))]))


def check(program: Callable[[Tensor, Tensor], Ranked], rec: Recommender, sessions: list[list[str]]) -> None:
    """Items in the same order; scores differ by rounding, because the product has another number of rows."""
    ids_BK, scores_BK, fallback_B = (result.tolist() for result in ranked_by(program, rec, sessions))
    ids = rec.item_ids.to_pylist()
    for row, expected in enumerate(rec.recommend(sessions, K).to_pylist()):
        found = [ids[item] for item in ids_BK[row] if item >= 0]
        assert found == expected["item_ids"]
        assert scores_BK[row][: len(found)] == pytest.approx(expected["scores"], abs=1e-5)
        assert fallback_B[row] == expected["fallback"]


@pytest.mark.parametrize("name", RECOMMENDERS)
def test_a_program_ranks_as_the_recommender(name: str) -> None:
    rec = RECOMMENDERS[name]()
    program = session_program(rec._files, K)
    with torch.no_grad():
        for sessions in (SESSIONS, *OTHERS):
            check(program, rec, sessions)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "dot")] + ["blend"])
@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_ranks_as_the_recommender_without_this_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rec, file = RECOMMENDERS[name](), tmp_path / "model.pt2"
    main(["--run", str(rec._files.path), "--output", str(file), "--k", str(K)])
    program = torch.export.load(file).module()
    for sessions in (SESSIONS, *OTHERS):
        check(program, rec, sessions)
    assert pq.read_table(tmp_path / "model.items.parquet")["title"].to_pylist() == rec.titles.to_pylist()

    example = str(ROOT / "examples" / "serve_exported.py")
    command = [sys.executable, "-I", "-c", WITHOUT_PACKAGE, example, str(file), json.dumps(SESSIONS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line, expected in zip(lines, rec.recommend(SESSIONS, K).to_pylist(), strict=True):
        assert [item for item, _ in line["items"]] == expected["item_ids"]
        assert [score for _, score in line["items"]] == pytest.approx(expected["scores"], abs=1e-5)
        assert line["fallback"] == expected["fallback"]

    shutil.copytree(rec._files.path, tmp_path / "RUN")
    monkeypatch.chdir(tmp_path)
    names = run_programs(ROOT / "docs" / "export.md")
    assert names["items"].shape == (3, K)
    linear, quantized = (
        {name for name, module in names[key].named_modules() if isinstance(module, kind)}
        for key, kind in (("model", torch.nn.Linear), ("quantized", torch.ao.nn.quantized.dynamic.Linear))
    )
    assert quantized == linear != set()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler, g++")
@pytest.mark.parametrize("name", RECOMMENDERS)
def test_a_compiled_program_ranks_as_the_recommender(name: str, tmp_path: Path) -> None:
    rec, file = RECOMMENDERS[name](), tmp_path / "model.pt2"
    write_program(rec._files, file, K)
    package = str(tmp_path / "compiled.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.load(file), package_path=package)
    program = torch._inductor.aoti_load_package(package)
    for sessions in (SESSIONS, *OTHERS):
        check(program, rec, sessions)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "model.txt"], "ends with .pt2"),
        (["--output", "s3://bucket/model.pt2"], "a program is written on this machine"),
        (["--output", "model.pt2", "--k", "0"], "k is 0"),
        (["--output", "model.pt2"], "has a language model, which is not exported; export that of stage sbr"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["--run", str(small_run().run), *words])
    assert list(tmp_path.iterdir()) == []
