"""The components themselves: TorchX's own checks, what they render, and that they hide nobody else's."""

import importlib.metadata
import inspect
import subprocess
from pathlib import Path

import jsonschema
import pytest
import torchx.specs as specs
import yaml
from torchx.components.component_test_base import ComponentTestCase
from torchx.runner import get_runner
from torchx.schedulers.kubernetes_scheduler import app_to_resource, sanitize_for_serialization
from torchx.specs import file_linter, finder

from tests.torchx.volcano import JOB
from torchx_components import rec

NAMES = ["prepare", "train", "evaluate", "score", "report", "extend", "serve", "pipeline"]
# Components that may have several ranks.
RANKED = ["train", "evaluate", "score"]
FILE = str(Path(rec.__file__).resolve())


class ComponentsTest(ComponentTestCase):
    """TorchX's own test case: every component parses and offers --help."""

    def test_every_component(self) -> None:
        for name in NAMES:
            with self.subTest(name):
                self.validate(rec, name)


@pytest.mark.parametrize("name", NAMES)
def test_the_linter_of_torchx_finds_nothing(name: str) -> None:
    assert file_linter.validate(FILE, name) == []


def test_only_components_are_annotated_as_such() -> None:
    annotated = [
        name
        for name, function in inspect.getmembers(rec, inspect.isfunction)
        if function.__annotations__.get("return") is specs.AppDef
    ]
    assert sorted(annotated) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_component_fits_a_cluster(name: str) -> None:
    app = getattr(rec, name)("--output", "/data/out", mounts=["type=volume", "src=claim", "dst=/data"])
    job = sanitize_for_serialization(app_to_resource(app, queue="default", service_account=None))
    jsonschema.validate(job, JOB)
    assert "/data/out" in " ".join(app.roles[0].args)


def test_training_restarts_and_keeps_what_the_user_sets() -> None:
    app = rec.train(nnodes=2, nproc=4, env={"PET_MAX_RESTARTS": "0", "A": "1"})
    (role,) = app.roles
    assert role.num_replicas == 2
    assert role.max_retries == 3
    assert role.env["PET_MAX_RESTARTS"] == "0"
    assert role.env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert role.env["A"] == "1"
    assert "--nnodes 2 --nproc_per_node 4" in role.args[1]
    assert rec.RESTART_ENV["PET_MAX_RESTARTS"] == "2"


@pytest.mark.parametrize("name", RANKED)
def test_nodes_and_gpus_are_those_asked_for(name: str) -> None:
    (role,) = getattr(rec, name)("--run", "/data/run", "--out=x", nnodes=3, nproc=2, gpu=2).roles
    assert (role.num_replicas, role.resource.gpu) == (3, 2)
    # Under torchrun, --run is short for an option of its own.
    run = "--run" if name == "train" else "--run_folder"
    assert "--nnodes 3 --nproc_per_node 2" in role.args[1]
    assert role.args[1].endswith(f"-m llmgr_rec.{name} {run} /data/run --out=x")


def test_the_pipeline_runs_its_own_module() -> None:
    assert rec.pipeline("--output", "x").roles[0].args == ["-m", "torchx_components.pipeline", "--output", "x"]


def test_the_service_listens_to_the_cluster() -> None:
    (role,) = rec.serve("--run", "/data/run", port=80).roles
    assert role.args == ["-m", "llmgr_rec.serve", "--host", "0.0.0.0", "--port", "80", "--run", "/data/run"]
    assert role.port_map == {"http": 80}


def test_the_runner_renders_by_file() -> None:
    with get_runner() as runner:
        info = runner.dryrun_component(
            f"{FILE}:train", ["--nproc", "2", "--", "--seed", "1"], "kubernetes", {"queue": "q"}
        )
    assert info.request.resource["spec"]["queue"] == "q"


def test_registered_components_hide_no_builtin() -> None:
    try:
        importlib.metadata.distribution("llmgr-rec")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the project is not installed in this environment (make venv installs it)")
    found = set(finder.get_components())
    assert {"dist.ddp", "utils.echo", *(f"llmgr.{name}" for name in NAMES)} <= found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("/data/a$$b", "are replaced on the way"),
        ("--output=/data/$(HOME)", "are replaced on the way"),
        ("s3://key:secret@bucket/run", "leave out keys and options"),
        ("--output=https://bucket/run?secret", "give s3://, gs://, hdfs:// or memory://"),
        ("/data/a\0b", "null characters"),
    ],
)
def test_an_argument_that_would_not_arrive_is_refused_in_one_line(
    name: str, word: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with get_runner() as runner, pytest.raises(SystemExit) as stop:
        runner.dryrun_component(f"{FILE}:{name}", ["--", "--output", word], "kubernetes", {"queue": "q"})
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    shown = word.partition("://")
    assert said.startswith(f"error: argument {f'{shown[0]}://...' if shown[1] else word!r}: ")
    assert "secret" not in said
    assert problem in said


# A quote, a backslash, wildcards, a lone dollar and a line break.
ODD_WORDS = ['/data/it\'s "a\\b"?*[1]', "/data/$x 5$ ~ `id` ; & !", "/data/a\nb", "/data/é 日本"]


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_argument_arrives_as_it_is_written(name: str) -> None:
    """The words of the container, as Kubernetes and bash read them."""
    with get_runner() as runner:
        info = runner.dryrun_component(f"{FILE}:{name}", ["--", *ODD_WORDS], "kubernetes", {"queue": "q"})
    job = yaml.safe_load(yaml.safe_dump(sanitize_for_serialization(info.request.resource)))
    command = job["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["command"]
    # Kubernetes leaves a $ alone where neither $ nor ( follows.
    assert not any("$$" in word or "$(" in word for word in command)
    if command[0] == "bash":
        # Only the quoted arguments at the end are of interest; before them stands the launcher.
        script = command[2][command[2].index(f"-m llmgr_rec.{name}") :]
        command = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {script}"], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
    assert command[-len(ODD_WORDS) :] == ODD_WORDS
