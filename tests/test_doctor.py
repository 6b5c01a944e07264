"""Checks of the doctor, and that it still reports when torch is missing or broken."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmgr_rec import doctor

ROOT = Path(__file__).parents[1]


def by_name(findings: Iterator[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def install(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    known = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(doctor, "version_of", known.get)


def test_this_environment_passes() -> None:
    findings = by_name(doctor.run_checks(core=False))
    failed = {name: finding.found for name, finding in findings.items() if finding.status == "FAIL"}
    assert failed == {}
    assert {"torch", "fbgemm works", "gloo", "atomic rename", "smollm2", "torchx"} <= set(findings)


def test_two_fbgemm_wheels_fail_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch="2.13.0", torchrec="1.8.0", fbgemm_gpu="1.8.0", fbgemm_gpu_cpu="1.8.0")
    finding = by_name(doctor.check_versions())["fbgemm"]
    assert finding.status == "FAIL"
    assert "both install the same files" in finding.found
    assert finding.fix.startswith("pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu && pip install --no-deps")


@pytest.mark.parametrize(
    ("versions", "name", "fix"),
    [
        ({"torchrec": "1.8.0", "fbgemm_gpu_cpu": "1.8.0"}, "torch", "pip install --no-deps torch==2.13.0"),
        ({"torch": "2.13.0", "torchrec": "1.9.2"}, "torchrec", "pip install --no-deps torchrec==1.8.0"),
        ({"torch": "2.13.0+cpu", "torchrec": "1.8.0"}, "fbgemm", "fbgemm-gpu-cpu==1.8.0"),
        ({"torch": "2.13.0", "fbgemm_gpu_cpu": "1.9.0"}, "fbgemm", "fbgemm-gpu-cpu==1.8.0"),
    ],
)
def test_other_versions_fail_with_the_command_that_fixes_them(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], name: str, fix: str
) -> None:
    install(monkeypatch, **versions)
    finding = by_name(doctor.check_versions())[name]
    assert finding.status == "FAIL"
    assert fix in finding.fix


def test_a_cuda_build_without_its_libraries_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cuda_build_of_torch", lambda: True)
    finding = by_name(doctor.check_torch_loads({}, "ImportError: libcublas.so.13: cannot open shared object file"))
    assert finding["torch loads"].status == "FAIL"
    assert "CUDA build" in finding["torch loads"].found
    assert "TORCH_INDEX=" in finding["torch loads"].fix


def test_a_gpu_with_the_wrong_wheels_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fbgemm_gpu_cpu="1.8.0")
    facts = {"cuda": ["Some GPU"], "gloo": True, "nccl": False, "bf16": True}
    findings = by_name(doctor.check_backends(facts))
    assert findings["nccl"].status == "FAIL"
    assert findings["fbgemm on GPU"].status == "FAIL"


def test_more_threads_than_cores_fail() -> None:
    assert by_name(doctor.check_threads({"threads": 10_000}))["threads"].status == "FAIL"


def test_a_read_only_folder_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", refuse)
    assert by_name(doctor.check_disk(tmp_path))["atomic rename"].status == "FAIL"


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_NEEDED_GB", 1e9)
    finding = by_name(doctor.check_disk(tmp_path))["disk"]
    assert finding.status == "FAIL"
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "file" / "cache"))
    finding = by_name(doctor.check_language_model())["model cache"]
    assert finding.status == "FAIL"
    assert "LLMGR_CACHE" in finding.fix


def test_a_probe_that_crashes_is_reported() -> None:
    assert doctor.probe("import os; os.abort()")[0] == {}
    assert doctor.probe("raise ImportError('no such library')") == ({}, "ImportError: no such library")


def run_with_torch(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs the doctor in a process in which `import torch` runs the given code."""
    (folder / "torch.py").write_text(code)
    path = f"{folder}:{ROOT}"
    command = [sys.executable, "-m", "llmgr_rec.doctor", "--core"]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


def test_it_reports_when_torch_is_broken(tmp_path: Path) -> None:
    done = run_with_torch(tmp_path, "raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    assert done.returncode == 2
    assert "FAIL  torch loads    ImportError: libtorch_cpu.so" in done.stdout
    assert "fix: pip install --no-deps --force-reinstall torch==2.13.0" in done.stdout
    assert re.fullmatch(r"[0-9:]+ INFO llmgr_rec \S+ doctor: reads the environment .*\n", done.stderr)


def test_it_reports_when_torch_kills_its_process(tmp_path: Path) -> None:
    done = run_with_torch(tmp_path, "import os; os._exit(139)")
    assert done.returncode == 2
    assert "FAIL  torch loads    the child process exited with code 139" in done.stdout


def test_nothing_but_the_standard_library_is_needed() -> None:
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import llmgr_rec.doctor",
    ]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stderr == ""
