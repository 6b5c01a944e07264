"""Calls the real torchx program, the way a user types it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
REQUEST_HEADING = "=== SCHEDULER REQUEST ==="


def torchx(
    words: Sequence[str], cwd: Path = ROOT, timeout_s: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs `torchx WORDS` with this interpreter's programs first on the PATH."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(
        [str(programs / "torchx"), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def torchx_in_process(words: Sequence[str], monkeypatch: pytest.MonkeyPatch, cwd: Path = ROOT) -> None:
    """Runs TorchX's command line in this process, which is faster; by default from the repository's folder."""
    from torchx.cli import argparse_util
    from torchx.cli.main import main
    from torchx.runner import config

    # TorchX remembers in its classes which options and defaults it has seen, for a process runs it once.
    for seen in (
        argparse_util.torchxconfig.called_args,
        argparse_util.torchxconfig._subcmd_configs,
        argparse_util.ArgOnceAction.called_args,
    ):
        seen.clear()
    monkeypatch.chdir(cwd)
    # Computed when TorchX is imported: the home folder, and the current one.
    monkeypatch.setattr(config, "DEFAULT_CONFIG_DIRS", [str(cwd)])
    main(list(words))


def rendered_job(words: Sequence[str], **env: str) -> dict[str, Any]:
    """The one document that `torchx run --dryrun -s kubernetes ...` prints."""
    done = torchx(words, **env)
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout.split(REQUEST_HEADING, 1)[1]))
    assert len(documents) == 1
    return documents[0]
