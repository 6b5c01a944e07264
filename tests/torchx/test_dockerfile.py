"""The Dockerfile without Docker: what it copies is there, and the programs that it runs exist."""

import re
import shlex
from importlib import import_module

from tests.torchx.launcher import ROOT

LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
STAGES = [match for line in LINES if (match := re.match(r"FROM (\S+) AS (\w+)$", line))]


def test_stages_follow_from_stages_before_and_the_cpu_image_is_the_default() -> None:
    names = [match[2] for match in STAGES]
    assert names[-1] == "cpu"
    assert "gpu" in names
    for number, match in enumerate(STAGES[1:], start=1):
        assert match[1] in names[:number]


def test_what_is_copied_is_there() -> None:
    copied = [shlex.split(line)[1:-1] for line in LINES if line.startswith("COPY ") and "--from=" not in line]
    assert {"requirements/cpu.txt", "requirements/gpu.txt", "llmgr_rec"} <= {name for names in copied for name in names}
    assert all((ROOT / name).exists() for names in copied for name in names)
    excluded_but_for = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name for names in copied for name in names} <= excluded_but_for


def test_programs_import_what_exists() -> None:
    programs = re.findall(r'python -c "from (\S+) import (\w+); ', "\n".join(LINES))
    assert len(programs) == 2
    assert all(hasattr(import_module(module), name) for module, name in programs)
