"""Checks of the doctor, and that it still reports when torch is missing or broken."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmgr_rec import doctor, versions
from llmgr_rec.commands import COMMANDS
from llmgr_rec.errors import UserError
from llmgr_rec.library_imports import command_imports, process_unchanged
from llmgr_rec.versions import TESTED

ROOT = Path(__file__).parents[1]


def by_name(findings: Iterator[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def install(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    known = {name.replace("_", "-"): version for name, version in installed.items()}
    monkeypatch.setattr(doctor, "version_of", known.get)
    monkeypatch.setattr(versions, "version_of", known.get)
    monkeypatch.setattr(versions, "cuda_build_of_torch", lambda: False)


def test_this_environment_passes() -> None:
    findings = by_name(doctor.run_checks(core=False))
    failed = {name: finding.found for name, finding in findings.items() if finding.status == "FAIL"}
    assert failed == {}
    assert {"versions", "fbgemm works", "gloo", "atomic rename", "smollm2", "torchx"} <= set(findings)


def test_versions_that_were_tested_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in TESTED:
        install(monkeypatch, torch=row.torch + "+cpu", torchrec=row.torchrec, fbgemm_gpu_cpu=row.fbgemm)
        assert by_name(doctor.check_versions())["versions"].status == "ok"
        assert versions.version_error() is None


# Newest first: NEW is what is installed next, OLD the default.
NEW, OLD = TESTED
NEW_REST = f"torchrec=={NEW.torchrec} fbgemm-gpu-cpu=={NEW.fbgemm}"
OLD_REST = f"torchrec=={OLD.torchrec} fbgemm-gpu-cpu=={OLD.fbgemm}"
TWO_WHEELS = {"fbgemm_gpu": OLD.fbgemm, "fbgemm_gpu_cpu": OLD.fbgemm}


@pytest.mark.parametrize(
    ("installed", "status", "found", "fix"),
    [
        ({}, "FAIL", "torch not installed, .* needed", f"pip install torch=={NEW.torch} && pip .* {NEW_REST}"),
        (
            {"torchrec": OLD.torchrec, "fbgemm_gpu_cpu": OLD.fbgemm},
            "FAIL",
            "torch not installed, .*: all three are needed",
            f"pip install torch=={OLD.torch}",
        ),
        (
            {"torch": OLD.torch, "torchrec": NEW.torchrec, "fbgemm_gpu_cpu": NEW.fbgemm},
            "FAIL",
            f"torch {OLD.torch}, .*: fbgemm {NEW.fbgemm} does not load with torch {OLD.torch}",
            f"pip install --no-deps {OLD_REST}",
        ),
        (
            {"torch": NEW.torch + "+cpu", "torchrec": OLD.torchrec, "fbgemm_gpu_cpu": OLD.fbgemm},
            "FAIL",
            f"fbgemm {OLD.fbgemm} does not load with torch",
            f"pip install --no-deps {NEW_REST}",
        ),
        (
            {"torch": OLD.torch, "torchrec": OLD.torchrec, **TWO_WHEELS},
            "FAIL",
            "both wheels of fbgemm install the same files",
            f"pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu && pip install --no-deps fbgemm-gpu-cpu=={OLD.fbgemm}",
        ),
        (
            {"torch": OLD.torch, "torchrec": NEW.torchrec, "fbgemm_gpu_cpu": OLD.fbgemm},
            "WARN",
            "not tested together",
            f"pip install --no-deps torchrec=={OLD.torchrec}",
        ),
        (
            {"torch": "99.0.0", "torchrec": "99.0.0", "fbgemm_gpu_cpu": "99.0.0"},
            "WARN",
            "torch 99.0.0, torchrec 99.0.0, fbgemm-gpu-cpu 99.0.0: not tested together",
            f"pip install torch=={NEW.torch} && pip install --no-deps {NEW_REST}",
        ),
    ],
)
def test_other_versions_are_one_line_with_the_command_that_fixes_them(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], status: str, found: str, fix: str
) -> None:
    install(monkeypatch, **installed)
    (finding,) = doctor.check_versions()
    assert finding.status == status
    assert re.search(found, finding.found)
    assert re.fullmatch(fix, finding.fix)
    error = versions.version_error()
    if "does not load" in found or "same files" in found:
        with pytest.raises(UserError, match=found), command_imports():
            pytest.fail("the imports of a command were reached")
    else:
        assert error is None


def test_an_environment_with_a_gpu_gets_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch=OLD.torch, torchrec=OLD.torchrec, fbgemm_gpu=NEW.fbgemm)
    monkeypatch.setattr(versions, "cuda_build_of_torch", lambda: True)
    assert versions.installed_combination().fix == f"pip install --no-deps fbgemm-gpu=={OLD.fbgemm}"
    # The public package index has CUDA builds of torch alone; with them, the CPU wheel of fbgemm works.
    install(monkeypatch, torch=OLD.torch, torchrec=OLD.torchrec, fbgemm_gpu_cpu=NEW.fbgemm)
    monkeypatch.setattr(versions, "cuda_build_of_torch", lambda: True)
    assert versions.installed_combination().fix == f"pip install --no-deps fbgemm-gpu-cpu=={OLD.fbgemm}"


def test_a_library_that_does_not_load_names_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        with process_unchanged():
            raise OSError("Could not load this library: fbgemm_gpu.so")

    with pytest.raises(OSError, match="Could not load"):
        load()
    install(monkeypatch, torch=OLD.torch, torchrec=OLD.torchrec, fbgemm_gpu_cpu=NEW.fbgemm)
    with pytest.raises(UserError, match=rf"fbgemm {NEW.fbgemm} does not load with torch {OLD.torch}; fix: pip"):
        load()


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor"}))
def test_a_command_checks_the_versions_before_it_imports_them(command: str) -> None:
    folder = ROOT / "llmgr_rec"
    files = [file for file in (folder / f"{command}.py", folder / command / "__main__.py") if file.exists()]
    assert "with command_imports():" in files[0].read_text()


def test_packages_outside_of_the_ranges_fail_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.status for finding in doctor.check_requirements()] == ["ok"]
    monkeypatch.setattr(doctor, "version_of", lambda name: {"pyarrow": "1.0", "duckdb": None}.get(name, "2026.12"))
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["pyarrow>=2", "duckdb>=1", "x>1; extra=='y'"])
    (finding,) = doctor.check_requirements()
    assert finding.found == "pyarrow 1.0, duckdb not installed"
    assert finding.fix == "pip install 'pyarrow>=2' 'duckdb>=1'"


@pytest.mark.parametrize(
    ("row", "running", "status"),
    [
        (OLD, (3, 10), "FAIL"),
        (OLD, (3, 11), "ok"),
        (OLD, (3, 13), "WARN"),
        (NEW, (3, 12), "ok"),
        (NEW, (3, 13), "ok"),
        (NEW, (3, 99), "WARN"),
    ],
)
def test_pythons(monkeypatch: pytest.MonkeyPatch, row: versions.Tested, running: tuple[int, int], status: str) -> None:
    install(monkeypatch, torch=row.torch, torchrec=row.torchrec, fbgemm_gpu_cpu=row.fbgemm)
    monkeypatch.setattr(doctor.sys, "version_info", running)
    assert by_name(doctor.check_python())["python"].status == status


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
    assert f"fix: pip install --no-deps --force-reinstall torch=={versions.version_of('torch')}" in done.stdout
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
