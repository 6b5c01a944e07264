"""Overlays of pods: what they change, and what is refused."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from torchx.runner import get_runner
from torchx.schedulers.kubernetes_scheduler import sanitize_for_serialization

from tests.documented import fences
from tests.torchx.launcher import ROOT
from tests.torchx.volcano import JOB
from torchx_components import rec


def rendered(overlay: Path | None, component: str = "train", *words: str) -> dict[str, Any]:
    options = ["--overlay", str(overlay)] if overlay else []
    with get_runner() as runner:
        info = runner.dryrun_component(f"{rec.__file__}:{component}", [*options, *words], "kubernetes", {"queue": "q"})
    job = sanitize_for_serialization(info.request.resource)
    assert isinstance(job, dict)
    return job


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [task["template"] for task in job["spec"]["tasks"]]


def test_the_documented_overlay_reaches_every_pod(tmp_path: Path) -> None:
    (documented,) = [content for language, content in fences(ROOT / "docs/kubernetes.md") if language == "yaml"]
    (tmp_path / "pods.yaml").write_text(documented)
    words = ["--nnodes", "2", "--mounts", "type=volume,src=claim,dst=/data"]
    plain, job = (rendered(overlay, "train", *words) for overlay in (None, tmp_path / "pods.yaml"))
    jsonschema.validate(job, JOB)
    for before, after in zip(pods(plain), pods(job), strict=True):
        assert after["metadata"]["labels"].pop("team") == "ranking"
        spec, (container,) = after["spec"], after["spec"]["containers"]
        assert spec.pop("nodeSelector") == {"accelerator": "h100"}
        assert spec.pop("tolerations") == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert spec.pop("imagePullSecrets") == [{"name": "registry"}]
        assert container["env"].pop()["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
        assert container.pop("envFrom") == [{"secretRef": {"name": "storage"}}]
        # The rest is as without the overlay, but for the id of the job.
        del container["command"], before["spec"]["containers"][0]["command"]
        names = [{entry["name"] for entry in pod["spec"]["containers"][0]["env"]} for pod in (before, after)]
        assert names[0] == names[1]
        del container["env"], before["spec"]["containers"][0]["env"]
        assert before["spec"].pop("nodeSelector", {}) == {}
        assert spec == before["spec"]


@pytest.mark.parametrize("name", ["prepare", "evaluate", "score", "report", "serve", "pipeline"])
def test_every_component_takes_an_overlay_as_it_is_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "pods.yaml").write_text("metadata: {annotations: {a: $x $$y, b: 2026-01-01}}\nspec: {priority: 5}")
    (pod,) = pods(rendered(tmp_path / "pods.yaml", name))
    assert pod["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false", "a": "$x $$y", "b": "2026-01-01"}
    assert pod["spec"]["priority"] == 5


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        ("", "is empty; give fields of a pod"),
        ("a: [", "cannot be read as YAML"),
        ("specs: {}", "has specs, did you mean spec?"),
        ("spec: []", "spec must be a mapping"),
        ("spec: {toleration: []}", "a pod has no field spec.toleration, did you mean tolerations?"),
        ("spec: {tolerations: {}}", "spec.tolerations is {}; it must be of type list[V1Toleration]"),
        ("spec: {volumes: {}}", "spec.volumes must be a list"),
        ("spec: {hostNetwork: 'yes'}", "spec.hostNetwork is 'yes'; it must be of type bool"),
        ("spec: {priority: true}", "spec.priority is True; it must be of type int"),
        ("spec: {nodeSelector: {gpus: 8}}", "spec.nodeSelector.gpus is 8; it must be of type str"),
        ("spec: {tolerations: [{kye: a}]}", "a pod has no field spec.tolerations.kye, did you mean key?"),
        ("spec: {containers: []}", "spec.containers must be a list of one mapping"),
        ("spec: {containers: [{evn: []}]}", "a pod has no field spec.containers.evn, did you mean env?"),
        ("metadata: {containers: [{env: []}]}", "a pod has no field metadata.containers"),
    ],
)
def test_a_wrong_overlay_is_refused_in_one_line(
    content: str | None, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pods.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        rendered(file)
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: overlay {file}")
    assert problem in said
