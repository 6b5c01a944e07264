"""The command lines of the documentation, through the real torchx program, without a cluster."""

import copy
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from tests.torchx.launcher import ROOT, rendered_job, torchx
from tests.torchx.volcano import JOB

DOCUMENTED = "run --dryrun -s kubernetes dist.ddp llmgr_rec.train"


@pytest.fixture(scope="module")
def documented_job() -> dict[str, Any]:
    return rendered_job(DOCUMENTED.split())


def only_container(job: dict[str, Any]) -> dict[str, Any]:
    (task,) = job["spec"]["tasks"]
    (container,) = task["template"]["spec"]["containers"]
    return container


def test_the_documented_line_renders_a_job_that_trains(documented_job: dict[str, Any]) -> None:
    jsonschema.validate(documented_job, JOB)
    container = only_container(documented_job)
    assert container["command"][:2] == ["bash", "-c"]
    assert "torchrun " in container["command"][2]
    # The positional word follows the module as its first argument, which the trainer skips.
    assert "--nproc_per_node 2 " in container["command"][2]
    assert container["command"][2].endswith("-m llmgr_rec.train llmgr_rec.train")
    assert documented_job["spec"]["queue"] == "default"
    assert documented_job["spec"]["maxRetry"] == 3


def test_the_documented_line_asks_for_enough(documented_job: dict[str, Any]) -> None:
    container = only_container(documented_job)
    assert container["image"] == "llmgr-rec:latest"
    assert container["resources"]["limits"]["memory"] == "16384M"
    assert container["resources"]["requests"]["memory"] == "15360M"
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert environment["PET_MAX_RESTARTS"] == "2"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_several_nodes_meet_at_the_first() -> None:
    line = (
        "run --dryrun -s kubernetes -cfg queue=ml,namespace=ml dist.ddp -j 3x2 --gpu 2 --image site/llmgr:1 "
        "--mounts type=volume,src=claim,dst=/data -- --dataset /data/dataset --output /data/run"
    )
    job = rendered_job(line.split())
    jsonschema.validate(job, JOB)
    tasks = job["spec"]["tasks"]
    assert [task["name"] for task in tasks] == ["train-0", "train-1", "train-2"]
    commands = [task["template"]["spec"]["containers"][0]["command"][2] for task in tasks]
    assert all("-m llmgr_rec.train --dataset /data/dataset --output /data/run" in command for command in commands)
    assert "${TORCHX_RANK0_HOST:=localhost}:29500" in commands[0]
    assert "${VC_TRAIN_0_HOSTS:=localhost}:29500" in commands[1]
    assert tasks[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    volumes = tasks[0]["template"]["spec"]["volumes"]
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in volumes[1:]] == ["claim"]


def _misspell(job: dict[str, Any]) -> None:
    job["spec"]["task"] = job["spec"].pop("tasks")


def _text_retry(job: dict[str, Any]) -> None:
    job["spec"]["maxRetry"] = "3"


def _no_memory(job: dict[str, Any]) -> None:
    only_container(job)["resources"]["requests"]["memory"] = "0M"


def _restart_pods(job: dict[str, Any]) -> None:
    job["spec"]["tasks"][0]["template"]["spec"]["restartPolicy"] = "Sometimes"


def _long_name(job: dict[str, Any]) -> None:
    job["metadata"]["name"] = "x" * 59


@pytest.mark.parametrize("spoil", [_misspell, _text_retry, _no_memory, _restart_pods, _long_name])
def test_the_schema_catches_mistakes(documented_job: dict[str, Any], spoil: Callable[[dict[str, Any]], None]) -> None:
    job = copy.deepcopy(documented_job)
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, JOB)


def test_the_same_line_on_this_machine() -> None:
    done = torchx(DOCUMENTED.replace("kubernetes", "local_cwd").split())
    assert done.returncode == 0, done.stderr
    assert "llmgr_rec.train llmgr_rec.train" in " ".join(done.stdout.split()).replace("' '", "")
    assert str(ROOT) in done.stdout


def test_a_component_by_file_needs_no_installation() -> None:
    words = "run --dryrun -s kubernetes torchx_components/rec.py:report --mem_mb 4096 -- --run /data/run --output out"
    container = only_container(rendered_job(words.split()))
    assert container["command"] == ["python", "-m", "llmgr_rec.report", "--run", "/data/run", "--output", "out"]
