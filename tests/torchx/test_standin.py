"""Submit, status, log, list and cancel through TorchX's command line, against a loopback stand-in for a cluster."""

from pathlib import Path

import jsonschema
import pytest
from kubernetes.config import kube_config

from tests.torchx import standin
from tests.torchx.launcher import torchx, torchx_in_process
from tests.torchx.standin import LOG, serving, write_kubeconfig
from tests.torchx.volcano import JOB

SUBMIT = (
    "run -s kubernetes -cfg queue=default,namespace=ml dist.ddp -j 2x1 -- --dataset /data/dataset --output /data/run"
)


def test_a_job_is_submitted_watched_and_canceled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeconfig = tmp_path / "config"
    # The client reads $KUBECONFIG once, when it is imported.
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    with serving() as server:
        write_kubeconfig(kubeconfig, server, "ml")

        def call(line: str) -> str:
            torchx_in_process(line.split(), monkeypatch)
            return capsys.readouterr().out

        handle = call(SUBMIT).strip().splitlines()[-1]
        ((namespace, name), job), *others = server.jobs.items()
        assert not others
        assert (namespace, handle) == ("ml", f"kubernetes://torchx/ml:{name}")
        jsonschema.validate(job, JOB)

        server.set_phase("ml", name, "Running")
        assert "RUNNING" in call(f"status {handle}")
        assert f"{name}-train-1-0" in call(f"log {handle}/train/1")
        assert handle in call("list -s kubernetes")
        call(f"cancel {handle}")
        assert not server.jobs
        assert ("DELETE", f"/apis/batch.volcano.sh/v1alpha1/namespaces/ml/jobs/{name}") in server.requests


def test_an_absent_cluster_is_an_error(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "config"
    with serving() as server:
        write_kubeconfig(kubeconfig, server, "ml")
    done = torchx(SUBMIT.split(), KUBECONFIG=str(kubeconfig))
    assert done.returncode != 0
    assert "refused" in done.stderr


def test_a_component_that_the_cluster_refuses_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeconfig = tmp_path / "config"
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))

    def refused(options: str = "") -> str:
        with pytest.raises(SystemExit) as ended:
            torchx_in_process(f"run -s kubernetes {options} llmgr.report -- --run /data/run".split(), monkeypatch)
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    with serving() as server:
        write_kubeconfig(kubeconfig, server, "ml")
        server.refusal = "Job is invalid:\n spec.tasks"
        assert refused() == "error: the cluster refuses the job: Job is invalid: spec.tasks"
        monkeypatch.setattr(standin, "JOBS", LOG)
        assert refused().startswith("error: the cluster refuses the job: 404 Not Found; is Volcano installed")
        assert not server.jobs
    assert "the cluster does not answer: " in refused()
