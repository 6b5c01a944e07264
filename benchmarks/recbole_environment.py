"""An environment of its own for RecBole 1.2.1, made by pip: its versions of numpy and pandas are not this project's."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from llmgr_rec.errors import UserError

VERSION = "1.2.1"
# RecBole asks for neither by an upper bound, but sets np.float from np.float_, which numpy 2 has no more, and fills
# columns of data frames in place, which pandas 3 no longer does. Without dependencies, because those bring ray and
# another torch; what is left out is imported by parts of it that are not used here.
PINS = (
    f"recbole=={VERSION}",
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
)
_COMPLETE = "complete.txt"
_CHECK = "from recbole.trainer import Trainer; from recbole.data import create_dataset"


def make_environment(folder: Path) -> Path:
    """Makes the environment where it is not there yet.

    Args:
        folder: Where it is, or is to be.

    Returns:
        Its Python.

    Raises:
        UserError: It could not be made.
    """
    folder = folder.absolute()
    python, complete = folder / "bin" / "python", folder / _COMPLETE
    contents = "\n".join([*PINS, _our_packages(), sys.version])
    if complete.is_file() and complete.read_text() == contents:
        return python
    print(f"making an environment for recbole {VERSION} in {folder}")
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"{folder} is not empty and is no virtual environment; give another --environment")
    try:
        venv.create(folder, clear=True, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"no virtual environment can be made in {folder} ({error}); is python3-venv there?") from None
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
        "--no-deps",
    ]
    _run([*install, *PINS], folder)
    # Torch and tensorboard are this project's: both sides train with the same torch. Its own packages come first.
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "torch_of_this_project.pth").write_text(_our_packages() + "\n")
    _run([str(python), "-c", _CHECK], folder)
    complete.write_text(contents)
    return python


def _our_packages() -> str:
    import torch

    return str(Path(torch.__file__).parents[1])


def _run(words: Sequence[str], folder: Path) -> None:
    # What the caller's environment adds to the path of modules would come before the environment's own.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    ran = subprocess.run(words, capture_output=True, text=True, env=clean)
    if ran.returncode:
        said = [line for line in (ran.stdout + ran.stderr).strip().splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no reason given")
        raise UserError(f"the environment for recbole {VERSION} cannot be made in {folder}: {reason.strip()}")
