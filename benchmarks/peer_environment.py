"""Virtual environments for the packages of the peers, made by pip: their versions of numpy and pandas are not ours."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmgr_rec.errors import UserError

_COMPLETE = "complete.txt"


@dataclass(frozen=True)
class PeerPackage:
    """A package and what it needs beside it.

    They are installed without their dependencies, because those would bring another torch. What is missing in the
    environment is taken from this project's.

    Args:
        name: Name on PyPI.
        version: Its version.
        others: Requirements beside it, each `name==version`.
        check: Python that imports what the peer's worker imports.
    """

    name: str
    version: str
    others: tuple[str, ...]
    check: str

    @property
    def pins(self) -> tuple[str, ...]:
        """All requirements of the environment."""
        return (f"{self.name}=={self.version}", *self.others)


RECBOLE = PeerPackage(
    "recbole",
    "1.2.1",
    # RecBole asks for neither by an upper bound, but sets np.float from np.float_, which numpy 2 has no more, and fills
    # columns of data frames in place, which pandas 3 no longer does. It also asks for ray, which no part needs here.
    (
        "numpy==1.26.4",
        "pandas==2.2.3",
        "scipy==1.14.1",
        "scikit-learn==1.5.2",
        "joblib==1.4.2",
        "threadpoolctl==3.5.0",
        "pytz==2024.2",
        "colorlog==4.7.2",
        "colorama==0.4.4",
        "texttable==1.7.0",
    ),
    "from recbole.trainer import Trainer; from recbole.data import create_dataset",
)
RECTOOLS = PeerPackage(
    "rectools",
    "0.19.0",
    (
        "attrs==23.2.0",
        "numpy==1.26.4",
        "pandas==2.3.3",
        "scipy==1.17.1",
        "pm-implicit==0.7.3",
        "threadpoolctl==3.8.0",
        "pytz==2026.6",
        "typeguard==4.6.1",
        "pytorch-lightning==2.5.2",
        "torchmetrics==1.9.0",
    ),
    "from rectools.models import SASRecModel; from pytorch_lightning import Trainer",
)


def make_environment(folder: Path, package: PeerPackage) -> Path:
    """Makes the environment where it is not there yet.

    Args:
        folder: Where it is, or is to be.
        package: What to install.

    Returns:
        Its Python.

    Raises:
        UserError: It could not be made.
    """
    # venv makes no environment in a link to a folder.
    folder = folder.resolve()
    python, complete = folder / "bin" / "python", folder / _COMPLETE
    contents = "\n".join([*package.pins, _our_packages(), sys.version])
    if complete.is_file() and complete.read_text() == contents:
        return python
    print(f"making an environment for {package.name} {package.version} in {folder}")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another --environment")
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"{folder} is not empty and is no virtual environment; give another --environment")
    try:
        venv.create(folder, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"no virtual environment can be made in {folder} ({error}); is python3-venv there?") from None
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--only-binary", ":all:"]
    _run([*install, "--no-deps", *package.pins], folder, package)
    # Both sides train with the same torch, this project's. The packages of the environment come before it.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch_of_this_project.pth").write_text(_our_packages() + "\n")
    _run([str(python), "-c", package.check], folder, package)
    complete.write_text(contents)
    return python


def _our_packages() -> str:
    import torch

    return str(Path(torch.__file__).parents[1])


def _run(words: Sequence[str], folder: Path, package: PeerPackage) -> None:
    # What the caller's environment adds to the path of modules would come before the environment's own.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    ran = subprocess.run(words, capture_output=True, text=True, env=clean)
    if ran.returncode:
        said = [line for line in (ran.stdout + ran.stderr).strip().splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no reason given")
        raise UserError(
            f"the environment for {package.name} {package.version} cannot be made in {folder}: {reason.strip()}"
        )
