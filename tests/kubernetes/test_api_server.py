"""Jobs of the documentation on a real Kubernetes API server: accepted, listed, watched, canceled, and refused.

The server stores and validates objects. Neither Volcano nor nodes are there, so nothing runs, and a test gives jobs
their status. `make test-k8s` runs these tests.
"""

import re
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import kube_config

from tests.documented import FENCE, fences, lines_of
from tests.kubernetes.api_server import ApiServer, running_server
from tests.kubernetes.programs import find_programs
from tests.torchx.launcher import ROOT, torchx_in_process

pytestmark = pytest.mark.kubernetes

NAMESPACE = "default"
JOBS = f"/apis/batch.volcano.sh/v1alpha1/namespaces/{NAMESPACE}/jobs"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PAGE = ROOT / "docs" / "kubernetes.md"


def documented_jobs() -> list[str]:
    """The lines of the page that submit jobs to Kubernetes."""
    lines = [line for block in FENCE.findall(PAGE.read_text()) for line in lines_of(block)]
    # Without --dryrun the first line submits the job that it shows.
    lines = [line.replace("run --dryrun", "run") for line in lines]
    return [line.removeprefix("torchx ") for line in lines if line.startswith("torchx run -s kubernetes")]


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if "kubernetes" not in request.config.getoption("markexpr"):
        pytest.skip("starts a Kubernetes API server: make test-k8s")
    programs = find_programs()
    if programs is None:
        pytest.skip("etcd and kube-apiserver are neither in KUBEBUILDER_ASSETS nor on the PATH: make test-k8s")
    with running_server(programs, tmp_path_factory.mktemp("kubernetes")) as started:
        definition = yaml.safe_load((Path(__file__).parent / "volcano_job.yaml").read_text())
        started.request("POST", DEFINITIONS, definition)
        _wait_for(started, f"/api/v1/namespaces/{NAMESPACE}")
        _wait_for(started, JOBS)
        yield started


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    """The server, without jobs, as the cluster that TorchX submits to from `tmp_path`."""
    server.request("DELETE", JOBS)
    kubeconfig = tmp_path / "kubeconfig"
    server.write_kubeconfig(kubeconfig, NAMESPACE)
    # The client reads $KUBECONFIG once, when it is imported.
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    (overlay,) = [content for language, content in fences(PAGE) if language == "yaml"]
    (tmp_path / "pods.yaml").write_text(overlay)
    (tmp_path / ".torchxconfig").write_text((ROOT / ".torchxconfig").read_text())
    return server


def _wait_for(server: ApiServer, path: str) -> None:
    """Waits for what the server makes a moment after it has started, or after it has accepted a definition."""
    for attempt in range(100):
        try:
            server.request("GET", path)
            return
        except urllib.error.HTTPError:
            if attempt == 99:
                raise
            time.sleep(0.1)


def set_phase(server: ApiServer, name: str, phase: str) -> None:
    """What Volcano does."""
    job = server.request("GET", f"{JOBS}/{name}")
    counts = {task["name"]: {"phase": {phase: 1}} for task in job["spec"]["tasks"]}
    status = {"status": {"state": {"phase": phase}, "taskStatusCount": counts}}
    server.request("PATCH", f"{JOBS}/{name}/status", status, "application/merge-patch+json")


def test_documented_jobs_are_accepted_listed_watched_and_canceled(
    cluster: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(line: str) -> str:
        torchx_in_process(line.split(), monkeypatch, tmp_path)
        return capsys.readouterr().out

    lines = documented_jobs()
    assert len(lines) >= 10
    handles = [call(line).strip().splitlines()[-1] for line in lines]
    jobs = {job["metadata"]["name"]: job for job in cluster.request("GET", JOBS)["items"]}
    assert handles == [f"kubernetes://torchx/{NAMESPACE}:{handle.rpartition(':')[2]}" for handle in handles]
    assert {handle.rpartition(":")[2] for handle in handles} == set(jobs)
    for name, job in jobs.items():
        assert job["spec"]["queue"] == "default"
        _check_pods(cluster, job)
        set_phase(cluster, name, "Running")
    listed = call("list -s kubernetes")
    assert all(handle in listed for handle in handles)
    assert "RUNNING" in call(f"status {handles[0]}")
    for left, handle in zip(range(len(handles) - 1, -1, -1), handles, strict=True):
        call(f"cancel {handle}")
        assert len(cluster.request("GET", JOBS)["items"]) == left


def _check_pods(cluster: ApiServer, job: dict[str, Any]) -> None:
    """Lets the server validate each pod of a job, which Volcano would create."""
    for task in job["spec"]["tasks"]:
        pod = {"apiVersion": "v1", "kind": "Pod", **task["template"]}
        pod["metadata"] = {**pod["metadata"], "name": f"{job['metadata']['name']}-{task['name']}-0"[:63]}
        created = cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All", pod)
        assert created["spec"]["containers"][0]["image"] == pod["spec"]["containers"][0]["image"]


@pytest.mark.parametrize(
    ("overlay", "options", "problem"),
    [
        ("spec: {containers: [{resources: {limits: {memory: plenty}}}]}", "", r"limits\.memory"),
        ("spec: {nodeSelector: {accelerator: h100}}", "-cfg namespace=absent", '"absent" not found'),
    ],
)
def test_what_the_server_refuses_is_one_line(
    overlay: str,
    options: str,
    problem: str,
    cluster: ApiServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "faulty.yaml").write_text(overlay)
    line = f"run -s kubernetes {options} llmgr.prepare --overlay faulty.yaml -- --output /data/dataset"
    with pytest.raises(SystemExit) as ended:
        torchx_in_process(line.split(), monkeypatch, tmp_path)
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.match(rf"error: the cluster refuses the job: .*{problem}", errors[0])
    assert not cluster.request("GET", JOBS)["items"]


def test_the_server_validates_pods(cluster: ApiServer) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": []}}
    with pytest.raises(urllib.error.HTTPError, match="422"):
        cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All", pod)
