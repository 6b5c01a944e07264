"""Every documented command exists and takes the options that are shown, and every entry point answers at once."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from llmgr_rec.errors import UserError
from llmgr_rec.plan import main as plan
from tests.documented import Command, check_command, documented_commands, documented_pages

ROOT = Path(__file__).parents[1]
COMMANDS = list(documented_commands())
PAGES = documented_pages()
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PAGE_IN_CODE = re.compile(r"docs/[a-z/-]+\.md")
ENTRY_POINTS = [
    f"llmgr_rec.{name}"
    for name in (
        "prepare",
        "train",
        "evaluate",
        "score",
        "explain",
        "export",
        "plan",
        "doctor",
        "report",
        "serve",
        "experiments.__main__",
    )
]
HEAVY = {"torch", "torchrec", "transformers", "pyarrow", "duckdb", "scipy", "matplotlib", "numpy"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.place)
def test_a_documented_command_is_right(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(command.line, monkeypatch)


# The shape of LLaMA-2-7B, which is what a plan needs of a model.
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] if "path/to/model" in command.line else [])
        for command in COMMANDS
        if "llmgr_rec.plan" in command.line
    ],
)
def test_a_documented_plan_fits(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path("path/to/model")
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA_2_7B))
    save_file({}, model / "model.safetensors")
    plan(shlex.split(command.line)[3:])
    assert "fits: at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "python -m llmgr_rec.train --confg quickstart",
        "python -m llmgr_rec.train --config quickstrat",
        "python -m llmgr_rec.doctor --cores",
        "python -m llmgr_rec.traim",
        "llmgr traim --dataset x",
        "llmgr train --datasett x",
        "make demmo",
        "make demo DATE=folder",
        "torchx run -s kubernetes dist.ddp --memmb 1",
        "torchx run -s kubernetes dist.ddp -- --datasett x",
        "torchrun --nproc 2 -m llmgr_rec.train --outputs x",
        "trochrun -m llmgr_rec.train",
    ],
)
def test_a_wrong_command_is_noticed(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, UserError, SystemExit, ModuleNotFoundError)):
        check_command(line, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link} is not there"
        if anchor:
            assert anchor in anchors(target), f"{link} is no heading there"


def anchors(page: Path) -> set[str]:
    """Headings as links name them: lower case, punctuation left out, hyphens for spaces."""
    headings = HEADING.findall(FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pages_that_code_names_are_there() -> None:
    named = {
        name
        for folder in ("llmgr_rec", "torchx_components", "datagen", "benchmarks", "examples")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".yaml"}
        for name in PAGE_IN_CODE.findall(file.read_text())
    }
    assert named, "no page is named, so this checks nothing"
    assert not {name for name in named if not (ROOT / name).is_file()}


def test_help_needs_no_heavy_import() -> None:
    code = f"""
import contextlib, importlib, io, sys
for name in {ENTRY_POINTS}:
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        importlib.import_module(name).main(["--help"])
    assert "usage" in said.getvalue().lower(), name
    heavy = {HEAVY} & set(sys.modules)
    assert not heavy, f"{{name}} --help imports {{sorted(heavy)}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
