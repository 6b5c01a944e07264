"""Which versions of torch, torchrec and fbgemm were tested together, and which are installed.

The table `TESTED` is the only place that states them: pyproject.toml, the locks and the pages are checked against it.
Imports only the standard library.
"""

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from llmgr_rec.errors import UserError


@dataclass(frozen=True)
class Tested:
    """Versions that tests of this package were run with; requirements/README.md says which tests.

    Args:
        torch: Version of torch, without the suffix of a build.
        torchrec: Version of torchrec.
        fbgemm: Version of `fbgemm-gpu-cpu` and of `fbgemm-gpu`.
        pythons: Versions of Python that they were run on.
    """

    torch: str
    torchrec: str
    fbgemm: str
    pythons: tuple[str, ...]


# From new to old. fbgemm is compiled for one minor version of torch and does not load with another.
TESTED = (
    Tested("2.14.1", "1.9.2", "1.9.0", ("3.11", "3.12", "3.13")),
    Tested("2.13.0", "1.8.0", "1.8.0", ("3.11",)),
)
FBGEMM_WHEELS = ("fbgemm-gpu-cpu", "fbgemm-gpu")
# Modules by the names under which some versions of Python pickle what is in them: 3.13 the classes of pathlib.
PICKLED_MODULES = {"pathlib._local": "pathlib"}
# What decides over the content of checkpoints and bundles, which record it.
_RECORDED = ("llmgr-rec", "torch", "torchrec", *reversed(FBGEMM_WHEELS), "transformers", "peft", "safetensors")


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Versions of the installed packages that determine the content of checkpoints and bundles, by package name."""
    return {name: version for name in _RECORDED if (version := version_of(name)) is not None}


def own_version() -> str:
    """Version of this package; empty if it is not installed."""
    return version_of("llmgr-rec") or ""


def cuda_build_of_torch() -> bool:
    """Whether torch is a CUDA build, judged by its files, because a broken torch cannot be imported."""
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders)


@dataclass(frozen=True)
class Combination:
    """Versions of torch, torchrec and fbgemm in one environment.

    Args:
        torch: Version of torch; None if it is not installed.
        torchrec: Version of torchrec; None if it is not installed.
        fbgemm: Versions of the installed wheels of fbgemm, by their names.
    """

    torch: str | None
    torchrec: str | None
    fbgemm: dict[str, str]

    def __str__(self) -> str:
        """Names and versions."""
        fbgemm: dict[str, str | None] = {**self.fbgemm} or {"fbgemm": None}
        found = {"torch": self.torch, "torchrec": self.torchrec, **fbgemm}
        return ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())

    @property
    def is_complete(self) -> bool:
        """Whether all three are installed."""
        return bool(self.torch and self.torchrec and self.fbgemm)

    @property
    def is_tested(self) -> bool:
        """Whether the tests were run with exactly these versions."""
        return bool(self._rows())

    @property
    def tested_pythons(self) -> list[tuple[int, int]]:
        """Versions of Python that tests of these versions were run on, or of any, if there were none; ascending."""
        pythons = {python for row in self._rows() or TESTED for python in row.pythons}
        return sorted((int(major), int(minor)) for major, minor in (python.split(".") for python in pythons))

    @property
    def problem(self) -> str:
        """Why they cannot work together, in words; empty if they may, tested or not."""
        if not self.is_complete:
            return "all three are needed"
        if len(self.fbgemm) > 1:
            return "both wheels of fbgemm install the same files"
        (fbgemm,) = self.fbgemm.values()
        rows = [
            row for row in TESTED if _minor(self.torch) == _minor(row.torch) or _minor(fbgemm) == _minor(row.fbgemm)
        ]
        if rows and not any(
            _minor(self.torch) == _minor(row.torch) and _minor(fbgemm) == _minor(row.fbgemm) for row in rows
        ):
            return f"fbgemm {fbgemm} does not load with torch {self.torch}"
        return ""

    @property
    def fix(self) -> str:
        """Command that installs tested versions instead: those for the same torch, or else those that change least."""
        wanted = max(TESTED, key=lambda row: (_minor(self.torch) == _minor(row.torch), self._in_common(row)))
        is_for_gpu = cuda_build_of_torch() and set(self.fbgemm) != {FBGEMM_WHEELS[0]}
        wheel = FBGEMM_WHEELS[is_for_gpu]
        commands, pins = [], []
        if _release(self.torch) != wanted.torch:
            # With what it asks for: a CUDA build does not load without its libraries.
            commands.append(f"pip install torch=={wanted.torch}")
        if len(self.fbgemm) > 1:
            commands.append(f"pip uninstall -y {' '.join(FBGEMM_WHEELS)}")
        if self.torchrec != wanted.torchrec:
            pins.append(f"torchrec=={wanted.torchrec}")
        if self.fbgemm != {wheel: wanted.fbgemm}:
            pins.append(f"{wheel}=={wanted.fbgemm}")
        if pins:
            # torchrec asks for the CUDA wheel of fbgemm, which would overwrite the files of the other.
            commands.append(f"pip install --no-deps {' '.join(pins)}")
        return " && ".join(commands)

    def _rows(self) -> list[Tested]:
        found = [_release(version) for version in (self.torch, self.torchrec, *self.fbgemm.values())]
        return [row for row in TESTED if found == [row.torch, row.torchrec, row.fbgemm]]

    def _in_common(self, row: Tested) -> int:
        found = [(self.torchrec, row.torchrec), *((version, row.fbgemm) for version in self.fbgemm.values())]
        return sum(_minor(one) == _minor(other) for one, other in found)


def installed_combination() -> Combination:
    """The versions in this environment."""
    fbgemm = {wheel: version for wheel in FBGEMM_WHEELS if (version := version_of(wheel))}
    return Combination(version_of("torch"), version_of("torchrec"), fbgemm)


def version_error() -> UserError | None:
    """The error of versions with which torchrec cannot be imported; None if they may work, or some are missing."""
    installed = installed_combination()
    if installed.is_complete and installed.problem:
        return UserError(f"{installed}: {installed.problem}; fix: {installed.fix}")
    return None


def _release(version: str | None) -> str:
    return (version or "").split("+")[0]


def _minor(version: str | None) -> str:
    found = re.match(r"\d+\.\d+", version or "")
    return found.group() if found else ""
