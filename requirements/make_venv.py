"""Builds a virtual environment from a full lock, once, and never leaves a half-built one that looks complete.

`make venv` calls it before every other target; when nothing changed it returns in a tenth of a second. It runs on any
Python 3, so that an old one can still say what is missing: hence no annotations and no newer syntax here.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
CANDIDATES = ("python3.11", "python3", "python3.12", "python3.13")
PROBE = "import sys; print('%d.%d' % sys.version_info[:2])"


class SetupError(Exception):
    """What the user can mend, in one line."""


def find_python(candidates, named):
    """The first interpreter that is new enough and can make virtual environments.

    Args:
        candidates: Program names, best first.
        named: The one that the user asked for, or "" to choose among the candidates.

    Raises:
        SetupError: There is none; the text says what to install.
    """
    found, bare = [], ""
    for name in [named] if named else candidates:
        version = _ask(name, PROBE)
        if version is None:
            continue
        found.append("%s is %s" % (name, version))
        if tuple(int(part) for part in version.split(".")) < OLDEST:
            continue
        if _ask(name, "import venv, ensurepip") is None:
            bare = bare or "%s (%s) lacks the venv module; mend: apt install python3-venv" % (name, version)
            continue
        return name
    if bare:
        raise SetupError(bare)
    raise SetupError(
        "Python 3.11 or newer is needed, found %s; mend: apt install python3.11 python3.11-venv, or give PYTHON=..."
        % ("only " + ", ".join(found) if found else "none" + (" called " + named if named else ""))
    )


def _ask(program, code):
    """What a Python program prints for a piece of code, None when it does not run."""
    try:
        done = subprocess.run([program, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


def fingerprint(*paths):
    """Hash of some files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def read_stamp(venv):
    """What a finished build wrote down; {} when none finished, or when the folder was moved since."""
    try:
        with open(os.path.join(venv, "complete.json")) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(stamp, dict):
        return {}
    return stamp if stamp.get("path") == venv and os.access(os.path.join(venv, "bin", "python"), os.X_OK) else {}


def write_stamp(venv, stamp):
    """Marks a build as finished, all or nothing."""
    partial = os.path.join(venv, "complete.json.tmp")
    with open(partial, "w") as file:
        json.dump(dict(stamp, path=venv), file)
    os.replace(partial, os.path.join(venv, "complete.json"))


def build(venv, lock, torch_index, python):
    """Brings the environment up to date with the lock and with this project's metadata.

    Args:
        venv: Absolute path of the environment.
        lock: Path of the lock.
        torch_index: Address of a further package index that has torch's CPU wheels, or "".
        python: Interpreter that the user asked for, or "".

    Raises:
        SetupError: No fitting Python, a failed installation or a broken result.
    """
    wanted = {"lock": fingerprint(lock), "project": fingerprint(os.path.join(ROOT, "pyproject.toml"))}
    stamp = read_stamp(venv)
    inner = os.path.join(venv, "bin", "python")
    if stamp.get("lock") != wanted["lock"]:
        found = find_python(CANDIDATES, python)
        print("Building %s from %s with %s" % (venv, lock, found), flush=True)
        if os.path.isdir(venv):
            shutil.rmtree(venv)
        _run([found, "-m", "venv", venv], "could not make %s" % venv)
        further = ["--extra-index-url", torch_index] if torch_index else []
        pip = [inner, "-m", "pip", "--disable-pip-version-check", "install"]
        _run([*pip, "--no-deps", "-r", lock, *further], "pip could not install %s; see its message above" % lock)
        stamp = {}
    if stamp.get("project") != wanted["project"]:
        # "compat" puts this folder on the path as a whole, so that packages added later are found, too.
        pip = [inner, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        editable = ["--no-build-isolation", "--config-settings", "editable_mode=compat", "--editable", ROOT]
        _run([*pip, "--no-deps", *editable], "pip could not install this project")
        _run([inner, "-m", "llmgr_rec.doctor", "--core"], "the environment does not work; the remedy stands above")
        write_stamp(venv, wanted)


def _run(command, failure):
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SetupError(failure)


def main():
    """Builds the environment; one builder at a time, a second one waits and finds it finished."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="folder of the environment")
    parser.add_argument("--lock", default=os.path.join("requirements", "cpu.txt"), help="lock to install")
    parser.add_argument("--torch-index", default="", help="further package index, for torch's CPU wheels")
    parser.add_argument("--python", default="", help="interpreter to build with, instead of the first fitting one")
    args = parser.parse_args()
    venv = os.path.abspath(args.venv)
    try:
        with open(venv + ".lock", "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            build(venv, args.lock, args.torch_index, args.python)
    except (SetupError, OSError) as error:
        sys.exit("error: %s" % error)


if __name__ == "__main__":
    main()
