"""Parts outside the package: an encoder, a head and baselines by import path, through every command that uses them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from llmgr_rec import Recommender, python_api
from llmgr_rec.baselines.blend import Blend
from llmgr_rec.config import Config, EncoderConfig, HeadConfig
from llmgr_rec.config_file import save_config, settings
from llmgr_rec.data.prompt_templates import load_templates
from llmgr_rec.errors import UserError
from llmgr_rec.evaluate import main as evaluate
from llmgr_rec.experiments.__main__ import main as experiments
from llmgr_rec.experiments.experiment import load_experiment
from llmgr_rec.modules.encoders import ENCODERS, build_encoder, encoder_class
from llmgr_rec.modules.heads import HEADS, build_head
from llmgr_rec.plan import main as plan
from llmgr_rec.storage.bundle import check_bundle_code, load_bundle
from llmgr_rec.train import main as train
from tests.small_run import config, small_run

ROOT = Path(__file__).parents[1]
# What the pages docs/extending/*.md show.
EXAMPLES = {part: ROOT / "examples" / f"own_{part}.py" for part in ("encoder", "baseline", "head")}
EXAMPLES["prompt"] = ROOT / "examples" / "own_prompt.yaml"
# The classes of the examples in one module, and beside them more baselines and parts with mistakes.
PARTS = (
    "\n".join(file.read_text() for file in EXAMPLES.values() if file.suffix == ".py")
    + """

def together(dataset, catalog, k_neighbors):
    return CoOccurrence(dataset, catalog, k_neighbors)


def number(dataset, catalog, k_neighbors):
    return 5


def of_two(dataset, catalog):
    return CoOccurrence(dataset, catalog, None)


def failing(dataset, catalog, k_neighbors):
    return 1 / 0


class Unfinished(SessionEncoder):
    def __init__(self, config, dim):
        super().__init__()


class OtherArguments(MeanPool):
    def __init__(self, config, dim, depth):
        super().__init__(config, dim)


class Failing(MeanPool):
    def __init__(self, config, dim):
        super().__init__(config, dim)
        self.project = nn.Linear(dim, config.depth)


class HeadOfTwo(PlainHead):
    def __init__(self, config, d1):
        super().__init__(config, d1, d1, 1)
"""
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with such an encoder, head and baseline, trained in a process that knows where they are."""
    folder = tmp_path_factory.mktemp("extensions")
    (folder / "outside").mkdir()
    (folder / "outside" / "my_parts.py").write_text(PARTS)
    configured = config()
    configured.sbr.epochs = configured.behave.epochs = 1
    save_config(configured, folder / "settings.yaml")
    words = ["--config", folder / "settings.yaml", "--dataset", small_run().dataset.path, "--output", folder / "run"]
    words += ["--encoder.name", "my_parts:MeanPool", "--head.name", "my_parts:PlainHead"]
    words += ["--blend.neighbors", "[my_parts:CoOccurrence]", "--prompt.templates", EXAMPLES["prompt"]]
    done = command(folder, "train", *map(str, words))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def command(folder: Path, name: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command in a process of its own, in which the parts can be imported."""
    paths = os.pathsep.join([str(ROOT), str(folder / "outside")])
    return subprocess.run(
        [sys.executable, "-m", f"llmgr_rec.{name}", *words],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def importable(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts can be imported, and have not been yet."""
    monkeypatch.syspath_prepend(run.parent / "outside")
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)


@pytest.mark.usefixtures("importable")
def test_a_run_with_parts_from_outside_is_evaluated(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "metrics.json"
    models = "sbr,my_parts:together,llmgr,item_knn"
    words = ["--run", run, "--dataset", small_run().dataset.path, "--output", output, "--models", models]
    evaluate([*map(str, words), "--allow_code", "my_parts"])
    content = json.loads(output.read_text())
    assert list(content["test"]) == ["item_knn", "sbr", "llmgr", "my_parts:together"]
    assert content["test"]["my_parts:together"] != content["test"]["item_knn"]
    assert set(content["blends"]["sbr"]) == {"my_parts:CoOccurrence"}
    assert all(metrics["hr@20"] > 0 for metrics in content["test"].values())


def test_a_run_with_parts_from_outside_is_scored_where_its_code_is_allowed(run: Path, tmp_path: Path) -> None:
    words = ["--run", str(run), "--input", str(small_run().dataset.path / "test"), "--output", str(tmp_path / "scores")]
    refused = command(run.parent, "score", *words)
    assert refused.returncode == 2
    assert "setting encoder.name is my_parts:MeanPool, which would run code of module my_parts" in refused.stderr
    assert "--allow_code my_parts" in refused.stderr
    assert not (tmp_path / "scores").exists()
    done = command(run.parent, "score", *words, "--allow_code", "my_parts")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "scores").num_rows == 90


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("stage", ["sbr", "behave"])
def test_a_bundle_imports_only_what_is_allowed(run: Path, stage: str) -> None:
    for allowed in ((), ("my_part",), ("my_parts.encoders",)):
        with pytest.raises(UserError, match=r"encoder\.name is my_parts:MeanPool, which would run code"):
            load_bundle(run / "export" / stage, allow_code=allowed)
        assert "my_parts" not in sys.modules
    bundle = load_bundle(run / "export" / stage, allow_code=["my_parts"])
    encoder = bundle.model.get_submodule("encoder" if stage == "sbr" else "recommender.encoder")
    assert type(encoder).__name__ == "MeanPool"
    # Its code has run already, so nothing more would.
    again = load_bundle(run / "export" / stage)
    assert again.model.state_dict().keys() == bundle.model.state_dict().keys()


@pytest.mark.usefixtures("importable")
def test_a_run_with_parts_from_outside_is_asked_from_python(run: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.name is my_parts:MeanPool, which would run code"):
        Recommender.load(run)
    recommender = Recommender.load(run, allow_code=["my_parts"])
    (row,) = recommender.recommend([["i1", "i3"]], k=5).to_pylist()
    assert len(set(row["item_ids"])) == 5


@pytest.mark.usefixtures("importable")
def test_what_python_trained_is_loaded_and_evaluated_with_its_code(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller has named the code, so that it is not asked for again."""
    asked: list[dict[str, object]] = []

    def run_command(command: str, options: dict[str, object], on_line: object = None) -> None:
        asked.append(options)
        if command == "train":
            shutil.copytree(run, str(options["output"]))
        if command == "evaluate":
            Path(str(options["output"])).write_text("{}")

    monkeypatch.setattr(python_api, "run_command", run_command)
    fitted = Recommender.fit([["i1", "i2"]], settings={"encoder.name": "my_parts:MeanPool"}, output=tmp_path / "fitted")
    assert fitted.recommend([["i1", "i3"]], k=5).num_rows == 1
    fitted.evaluate()
    assert asked[-1]["allow_code"] == "my_parts,my_parts"


def test_own_templates_are_recorded_with_those_that_they_leave_as_they_are(run: Path) -> None:
    expected = {task: one.text for task, one in load_templates(str(EXAMPLES["prompt"])).items()}
    assert expected["behave"] != load_templates("compact")["behave"].text
    for file in (run / "prompts.yaml", run / "export" / "behave" / "prompts.yaml"):
        assert yaml.safe_load(file.read_text()) == expected


@pytest.mark.parametrize("part", EXAMPLES)
def test_the_page_of_a_part_shows_the_whole_example(part: str) -> None:
    text = EXAMPLES[part].read_text()
    language = EXAMPLES[part].suffix.removeprefix(".").replace("py", "python")
    assert len(text.splitlines()) < 40
    page = (ROOT / "docs" / "extending" / f"{part}.md").read_text()
    assert re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL) == [text]
    assert f"../../examples/{EXAMPLES[part].name}" in page


def test_a_blend_is_loaded_without_the_code_that_made_it(run: Path) -> None:
    blend = Blend.load(run / "export" / "sbr" / "blend.npz")
    assert set(blend.weights) == {"my_parts:CoOccurrence"}


@pytest.mark.usefixtures("importable")
def test_evaluate_and_a_head_from_outside_are_refused_without_leave(run: Path, tmp_path: Path) -> None:
    words = ["--run", run, "--dataset", small_run().dataset.path, "--output", tmp_path / "metrics.json"]
    with pytest.raises(UserError, match="would run code of module my_parts"):
        evaluate([*map(str, words)])
    configured = Config(head=HeadConfig(name="my_parts:PlainHead"))
    with pytest.raises(UserError, match=r"bundle B: setting head\.name is my_parts:PlainHead, which would run code"):
        check_bundle_code(configured, Path("B"), ())
    check_bundle_code(configured, Path("B"), ("my_parts",))
    assert "my_parts" not in sys.modules


@pytest.mark.usefixtures("importable")
def test_a_run_is_resumed_with_code_that_is_named_or_allowed(run: Path) -> None:
    words = ["--resume", "--output", str(run), "--dataset", str(small_run().dataset.path)]
    with pytest.raises(UserError, match=r"config\.yaml: setting encoder\.name is my_parts:MeanPool, which would run"):
        train(words)
    with pytest.raises(UserError, match=r"setting blend\.neighbors\[0\] is my_parts:CoOccurrence, which would run"):
        train([*words, "--encoder.name", "my_parts:MeanPool", "--head.name=my_parts:PlainHead"])
    assert "my_parts" not in sys.modules
    train([*words, "--allow_code", "my_parts"])
    assert "my_parts" in sys.modules


@pytest.mark.usefixtures("importable")
def test_an_experiment_compares_parts_from_outside(tmp_path: Path) -> None:
    file = tmp_path / "outside.yaml"
    file.write_text("""
title: Parts from outside
config: quickstart
settings: {tables.dim: 8, sbr.epochs: 1, align.epochs: 0, behave.epochs: 0, blend.neighbors: [], runtime.device: cpu, \
runtime.threads_per_rank: 1}
variants:
  GC-SAN: {model: sbr}
  Mean: {model: sbr, settings: {encoder.name: "my_parts:MeanPool"}}
  Mean and neighbors:
    model: sbr
    settings: {encoder.name: "my_parts:MeanPool", blend.neighbors: ["my_parts:CoOccurrence"]}
  Together: {model: "my_parts:together"}
""")
    output = tmp_path / "out"
    experiments(
        ["--experiment", str(file), "--dataset", str(small_run().dataset.path), "--output", str(output), "--seeds", "0"]
    )
    found = json.loads((output / "outside.json").read_text())["variants"]
    means = {name: variant["ndcg@20"]["mean"] for name, variant in found.items()}
    assert len(set(means.values())) == 4
    # The model is trained already, and this process has not imported its encoder.
    sys.modules.pop("my_parts")
    for trial in (output / "trials").iterdir():
        trial.unlink()
    experiments(
        ["--experiment", str(file), "--dataset", str(small_run().dataset.path), "--output", str(output), "--seeds", "0"]
    )
    again = json.loads((output / "outside.json").read_text())["variants"]
    assert {name: variant["ndcg@20"]["mean"] for name, variant in again.items()} == means


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gcsam", r"encoder\.name is gcsam, which is neither .*, did you mean gcsan\?"),
        ("no_such.parts:Mean", r"there is no module no_such; install it, or put its folder on PYTHONPATH"),
        ("my_parts:MeanPol", r"my_parts has no MeanPol, did you mean MeanPool\?"),
        ("my_parts:PlainHead", r"is not a subclass of llmgr_rec\.modules\.session_encoder\.SessionEncoder; derive"),
        ("my_parts:together", r"is not a subclass of llmgr_rec\.modules\.session_encoder\.SessionEncoder; derive"),
        ("my_parts:", r"is my_parts:, which is not an import path; give module:attribute"),
        ("my_parts:a.b", r"is my_parts:a\.b, which is not an import path"),
        ("../my_parts:MeanPool", r"which is not an import path"),
        ("my_part:MeanPool", r"but there is no module my_part, did you mean my_parts\?$"),
        ("my_parts.py:MeanPool", r"there is no module my_parts\.py; my_parts is a module, write my_parts:NAME$"),
        ("llmgr_rec.modules.gcsam:GCSAN", r"gcsam, did you mean llmgr_rec\.modules\.gcsan\?$"),
        (
            "__main__:Mean",
            r"cannot import what a script or notebook defines; move it into a module$",
        ),
        ("broken:Mean", r"importing broken failed in .*broken\.py:2 \(NameError: .*missing.*\); correct that code$"),
        ("typo:Mean", r"importing typo failed in .*typo\.py:1 \(SyntaxError: expected ':'\); correct that code$"),
        ("program:Mean", r"importing program failed in .*program\.py:2 \(SystemExit: 3\); correct that code$"),
        ("lacking:Mean", r"there is no module no_such_package; install it"),
        ("my_parts:Unfinished", r"is my_parts:Unfinished, which lacks the method forward; define it$"),
        (
            "my_parts:OtherArguments",
            r"which takes \(config, dim, depth\), but is called with \(config, dim\): missing a required argument: "
            r"'depth'; change its arguments$",
        ),
    ],
)
def test_a_wrong_name_is_reported(run: Path, tmp_path: Path, name: str, message: str) -> None:
    (run.parent / "outside" / "broken.py").write_text("value = 1\nmissing\n")
    (run.parent / "outside" / "lacking.py").write_text("import no_such_package\n")
    (run.parent / "outside" / "typo.py").write_text("class Mean\n    pass\n")
    (run.parent / "outside" / "program.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UserError, match=message):
        build_encoder(EncoderConfig(name=name), 8)
    with pytest.raises(UserError, match=message):
        plan(["--num_items", "10", "--encoder.name", name])
    words = ["--config", "quickstart", "--dataset", str(small_run().dataset.path), "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match=message):
        train([*words, "--encoder.name", name])
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("importable")
def test_wrong_heads_and_baselines_are_reported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"head\.name is tid, which is neither .*, did you mean tied\?"):
        build_head(HeadConfig(name="tid"), 8, 16, 10)
    dataset = str(small_run().dataset.path)
    words = ["--run", str(run), "--dataset", dataset, "--output", str(tmp_path / "metrics.json"), "--models"]
    with pytest.raises(
        UserError, match=r"takes \(config, d1\), but is called with \(config, d1, d2, num_items\): too many"
    ):
        build_head(HeadConfig(name="my_parts:HeadOfTwo"), 8, 16, 10)
    failed = r"but calling it failed in .*my_parts\.py:\d+ \(AttributeError: .*depth.*\); correct that code$"
    with pytest.raises(UserError, match=rf"^setting encoder\.name is my_parts:Failing, {failed}"):
        build_encoder(EncoderConfig(name="my_parts:Failing"), 8)
    for name, message in (
        ("my_parts:of_two", r"takes \(dataset, catalog\), but is called with \(dataset, catalog, k_neighbors\)"),
        ("my_parts:failing", r"calling it failed in .*my_parts\.py:\d+ \(ZeroDivisionError: division by zero\)"),
        ("my_parts:togeter", r"--models is my_parts:togeter, but my_parts has no togeter, did you mean together\?"),
        ("my_parts:number", r"baseline my_parts:number made a int without a method rank"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate([*words, name])
    asked = ["--config", "quickstart", "--dataset", dataset, "--output", str(tmp_path / "run"), "--blend.neighbors"]
    for name in ("popularity", "my_parts:MeanPool"):
        with pytest.raises(UserError, match=rf"blend\.neighbors names {name}, which has no matrix of item"):
            train([*asked, f"[{name}]"])


def test_an_experiment_names_the_variant_whose_part_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    for line, message in (
        ("{model: sbr, settings: {encoder.name: sasre}}", r"variant A: setting encoder\.name is sasre, .*sasrec\?"),
        ('{model: "no_such:Thing"}', r"variant A is no_such:Thing, but there is no module no_such"),
        ("{model: sbr, settings: {blend.neighbors: [popularity]}}", r"variant A: .*blend\.neighbors names popularity"),
    ):
        file.write_text(f"variants:\n  A: {line}\n")
        with pytest.raises(UserError, match=message):
            load_experiment(str(file))


def test_the_settings_name_every_known_part() -> None:
    helps = {one.name: one.info.help for one in settings(Config())}
    assert all(f"{name}," in helps["encoder.name"] for name in ENCODERS)
    assert all(f"{name} " in helps["head.name"] for name in HEADS)
    assert encoder_class("llmgr_rec.modules.gcsan:GCSAN") is ENCODERS["gcsan"]
