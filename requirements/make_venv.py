"""Builds a virtual environment from a lock file. An interrupted build is never taken for a complete one.

The targets of the Makefile call it first. If nothing changed it returns in a tenth of a second. It runs on any
Python 3, so that an old interpreter can report what is missing: no annotations and no newer syntax here.
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
CANDIDATES = ("python3.11", "python3.12", "python3.13", "python3")
PROBE = "import sys; print('%d.%d' % sys.version_info[:2])"


class SetupError(Exception):
    """An error that the user can fix, in one line."""


def find_python(candidates, requested):
    """Finds the first interpreter that is new enough and can create virtual environments.

    Args:
        candidates: Program names, in order of preference.
        requested: Interpreter requested by the user, or "" to choose among the candidates.

    Raises:
        SetupError: There is no such interpreter. The message says what to install.
    """
    too_old, without_venv = [], ""
    for name in [requested] if requested else candidates:
        version = _run_code(name, PROBE)
        if version is None:
            continue
        if tuple(int(part) for part in version.split(".")) < OLDEST:
            too_old.append("%s is %s" % (name, version))
            continue
        if _run_code(name, "import venv, ensurepip") is None:
            error = "%s (%s) lacks the venv module; fix: apt install python3-venv" % (name, version)
            without_venv = without_venv or error
            continue
        return name
    if without_venv:
        raise SetupError(without_venv)
    raise SetupError(
        "Python 3.11 or newer is needed, found %s; fix: apt install python3.11 python3.11-venv, or give PYTHON=..."
        % ("only " + ", ".join(too_old) if too_old else "none" + (" called " + requested if requested else ""))
    )


def _run_code(program, code):
    """Output of code run by an interpreter, or None if it fails."""
    try:
        done = subprocess.run([program, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


def fingerprint(*paths):
    """Hash of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def read_stamp(venv):
    """The stamp of a finished build; {} if none finished, or if the folder was moved."""
    try:
        with open(os.path.join(venv, "complete.json")) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(stamp, dict):
        return {}
    return stamp if stamp.get("path") == venv and os.access(os.path.join(venv, "bin", "python"), os.X_OK) else {}


def write_stamp(venv, stamp):
    """Marks a build as finished, atomically."""
    partial = os.path.join(venv, "complete.json.tmp")
    with open(partial, "w") as file:
        json.dump(dict(stamp, path=venv), file)
    os.replace(partial, os.path.join(venv, "complete.json"))


def require_same_origin(venv, stamp, lock, python):
    """Refuses to replace an environment of another lock file or another Python.

    Args:
        venv: Absolute path of the environment.
        stamp: Stamp of its build.
        lock: Path of the lock file.
        python: Interpreter requested by the user, or "".

    Raises:
        SetupError: The environment in this folder has another origin, or the interpreter cannot be used.
    """
    built_from = stamp.get("name", os.path.basename(lock))
    if built_from != os.path.basename(lock):
        raise SetupError(
            "%s was built from %s, not %s; fix: give another folder with VENV=, or delete it"
            % (venv, built_from, os.path.basename(lock))
        )
    if python:
        found = _run_code(os.path.join(venv, "bin", "python"), PROBE)
        wanted = _run_code(find_python((), python), PROBE)
        if found != wanted:
            raise SetupError(
                "%s has Python %s, not %s; fix: give another folder with VENV=, or delete it" % (venv, found, wanted)
            )


def build(venv, lock, torch_index, python, tools=""):
    """Updates the environment to the lock files and the metadata of this project.

    Args:
        venv: Absolute path of the environment.
        lock: Path of the lock file. If its content changed, the environment is built anew; one of another file stays.
        torch_index: URL of an extra package index with CPU wheels of torch, or "".
        python: Interpreter requested by the user, or "".
        tools: Path of a lock file of further packages, which are added to the environment; "" adds none.

    Raises:
        SetupError: The environment is of another lock file or another Python, no suitable Python was found, the
            installation failed, or the result does not work.
    """
    wanted = {
        "name": os.path.basename(lock),
        "lock": fingerprint(lock),
        "project": fingerprint(os.path.join(ROOT, "pyproject.toml")),
    }
    stamp = read_stamp(venv)
    if stamp:
        require_same_origin(venv, stamp, lock, python)
    inner = os.path.join(venv, "bin", "python")
    pip = [inner, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    if stamp.get("lock") != wanted["lock"]:
        found = find_python(CANDIDATES, python)
        print("Building %s from %s with %s" % (venv, lock, found), flush=True)
        if os.path.isdir(venv):
            shutil.rmtree(venv)
        _run([found, "-m", "venv", venv], "could not create %s" % venv)
        index = ["--extra-index-url", torch_index] if torch_index else []
        _run([*pip, "-r", lock, *index], "pip could not install %s; see its message above" % lock)
        stamp = {}
    if stamp.get("project") != wanted["project"]:
        # "compat" adds this folder to the path, so that packages added later are found, too.
        editable = ["--no-build-isolation", "--config-settings", "editable_mode=compat", "--editable", ROOT]
        _run([*pip, "--quiet", *editable], "pip could not install this project")
        _run([inner, "-m", "llmgr_rec.doctor", "--core"], "the environment does not work; see the fix above")
        stamp = dict(stamp, **wanted)
        write_stamp(venv, stamp)
    if tools and stamp.get("tools") != fingerprint(tools):
        print("Adding %s to %s" % (tools, venv), flush=True)
        _run([*pip, "--quiet", "-r", tools], "pip could not install %s; see its message above" % tools)
        write_stamp(venv, dict(stamp, tools=fingerprint(tools)))


def _run(command, failure):
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SetupError(failure)


def main():
    """Builds the environment. A second process waits for the first one and finds the environment finished."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"), help="folder of the environment")
    parser.add_argument("--lock", default=os.path.join("requirements", "cpu.txt"), help="lock file to install")
    parser.add_argument("--tools", default="", help="lock file of packages to add, such as requirements/dev.txt")
    parser.add_argument("--torch-index", default="", help="extra package index with CPU wheels of torch")
    parser.add_argument("--python", default="", help="interpreter to use, instead of the first suitable one")
    args = parser.parse_args()
    venv = os.path.abspath(args.venv)
    try:
        with open(venv + ".lock", "w") as lock_file:
            fcntl.flock(lock_file, fcntl.LOCK_EX)
            build(venv, args.lock, args.torch_index, args.python, args.tools)
    except (SetupError, OSError) as error:
        sys.exit("error: %s" % error)


if __name__ == "__main__":
    main()
