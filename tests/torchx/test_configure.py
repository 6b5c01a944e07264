"""`python -m torchx_components.configure`: the defaults of `torchx run` in a folder other than the repository's."""

import configparser
import os
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from llmgr_rec.errors import UserError
from tests.torchx.launcher import REQUEST_HEADING, ROOT, torchx_in_process
from tests.torchx.test_components import NAMES
from tests.torchx.volcano import JOB
from torchx_components.configure import COMPONENTS, main

MOUNTS = "type=volume,src=claim,dst=/data"


def printed(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What TorchX prints for a scheduler, for a line that is typed in the folder."""
    torchx_in_process(line.split(), monkeypatch, folder)
    return capsys.readouterr().out.split(REQUEST_HEADING, 1)[1]


def test_the_file_of_the_repository_is_what_the_command_writes(tmp_path: Path) -> None:
    main(["--output", str(tmp_path / "config")])
    assert (tmp_path / "config").read_text() == (ROOT / ".torchxconfig").read_text()
    assert list(COMPONENTS) == NAMES


def test_the_documented_line_works_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--image", "site/llmgr:1", "--queue", "ml", "--mounts", MOUNTS, "--service_account", "bot"])
    job = yaml.safe_load(printed("run --dryrun -s kubernetes dist.ddp llmgr_rec.train", tmp_path, monkeypatch, capsys))
    (pod,) = [task["template"]["spec"] for task in job["spec"]["tasks"]]
    assert pod.pop("serviceAccountName") == "bot"
    jsonschema.validate(job, JOB)
    assert job["spec"]["queue"] == "ml"
    assert pod["containers"][0]["image"] == "site/llmgr:1"
    assert pod["volumes"][1]["persistentVolumeClaim"]["claimName"] == "claim"


def test_what_is_there_is_kept_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".torchxconfig").write_text("mine")
    with pytest.raises(UserError, match=r"\.torchxconfig exists; edit it, or give --overwrite"):
        main([])
    assert (tmp_path / ".torchxconfig").read_text() == "mine"
    with pytest.raises(UserError, match=r"--image is 'a.*without line breaks"):
        main(["--overwrite", "--image", "a\nqueue = b"])
    (tmp_path / "pods.yaml").write_text("")
    main(["--overwrite", "--image", "a%b", "--overlay", "pods.yaml", "--partition", "gpu", "--time", "1-12:00:00"])
    config = configparser.ConfigParser()
    config.read(".torchxconfig")
    assert config["component:llmgr.score"]["image"] == "a%b"
    assert config["component:llmgr.score"]["overlay"] == str(tmp_path / "pods.yaml")
    assert "overlay" not in config["component:dist.ddp"]
    assert dict(config["slurm"]) == {"partition": "gpu", "time": "1-12:00:00"}


# Plays srun: runs the command of a task with the variables that are given for it.
SRUN = """#!/bin/bash
for word in "$@"; do
  case $word in
    --export=ALL,*) IFS=, read -ra pairs <<< "${word#--export=ALL,}"; export "${pairs[@]}" ;;
    --*) ;;
    *) break ;;
  esac
  shift
done
exec "$@"
"""


def test_a_slurm_job_activates_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script of the job, with programs that stand for srun and torchrun."""
    main(["--output", str(tmp_path / ".torchxconfig"), "--partition", "gpu"])
    programs, environment = tmp_path / "programs", tmp_path / "environment"
    for program, content in ((programs / "srun", SRUN), (environment / "torchrun", '#!/bin/bash\necho "ran $*"\n')):
        program.parent.mkdir()
        program.write_text(content)
        program.chmod(0o755)
    (tmp_path / "activate.sh").write_text(f"PATH={environment}:$PATH\n")
    line = f"dist.ddp -j 1x2 --env BASH_ENV={tmp_path / 'activate.sh'} -m llmgr_rec.train -- --dataset x"
    request = printed(f"run --dryrun -s slurm {line}", tmp_path, monkeypatch, capsys)
    script = request[request.index("#!/bin/bash") :]
    assert "#SBATCH --job-name=train-0 --requeue --partition=gpu" in script
    done = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{programs}:{os.defpath}", "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    (ran,) = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert ran.endswith("-m llmgr_rec.train --dataset x")
