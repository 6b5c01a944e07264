"""Paths that the user names: what is not on this machine, or no path at all, is refused in one line."""

import pickle
import re
import sys
from pathlib import Path

import pytest

from llmgr_rec.cache import cache_folder
from llmgr_rec.cli import run_cli
from llmgr_rec.config import Config, settings
from llmgr_rec.config_file import load_config
from llmgr_rec.errors import UserError
from llmgr_rec.files import require_writable
from llmgr_rec.paths import local_path, path_problem, storage_path
from llmgr_rec.remote_path import as_path
from tests.commands import command_names, main_of, options_of, takes_path, takes_url, type_of

# Help texts begin with what the value is.
_FILE = re.compile(r"(\w+ ){0,2}(file|folder)s?\b", re.IGNORECASE)
# Settings that may be paths; `Config.validate` checks them.
SETTINGS = {f"--{one.name}" for one in settings(Config()) if one.info.is_path}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("runs/a", ""),
        ("/data/a b'c", ""),
        ("C:a", ""),
        ("dt=2026:07/x", ""),
        ("./s3:/b", ""),
        (r"a\b$$c$(HOME)?*[1]", ""),
        ("s3://b/ds", "remote storage is not supported here"),
        ("S3:/b/ds", "remote storage is not supported here"),
        (" gs://b", "remote storage is not supported here"),
        ("dbfs:/mnt/x", "remote storage is not supported here"),
        ("abfss://c@account.dfs.core.windows.net/x", "remote storage is not supported here"),
        ("file:///data/a", "leave out file://"),
        ("a\0b", "leave out the null character"),
        ("a\udc80b", "give text in UTF-8"),
        ("a/" + "é" * 128, "at most 255 bytes"),
        ("~no_such_user/a", r"\./~no_such_user/a"),
        ("", "give the path"),
        (" ", "give the path"),
    ],
)
def test_a_path_is_on_this_machine(text: str, problem: str) -> None:
    if not problem:
        assert path_problem(text) == ""
        assert local_path(text) == text
        return
    assert problem.replace("\\", "") in path_problem(text)
    with pytest.raises(ValueError, match=problem):
        local_path(text)


def test_the_home_folder_is_put_in_place_of_a_tilde() -> None:
    assert local_path("~/runs") == str(Path.home() / "runs")


@pytest.mark.parametrize("command", command_names())
def test_every_option_that_is_a_path_takes_or_refuses_remote_storage(command: str) -> None:
    options = options_of(command)
    for name, option in options.items():
        if "str" in str(type_of(option)) and _FILE.match(str(option.help)) and name not in SETTINGS:
            assert takes_path(option), f"{name} is the path of a file or folder; give it the type StoragePath"
    for name, option in options.items():
        if takes_url(option):
            with pytest.raises(UserError, match=r"is s3://\.\.\.; leave out keys and options") as error:
                main_of(command)([*_required(options), name, "s3://KEY:SECRET@b/c"])
            assert "SECRET" not in str(error.value)
        elif takes_path(option) or name in SETTINGS:
            with pytest.raises(UserError, match=r"is s3://b/c; give a path on this machine, because remote storage"):
                main_of(command)([*_required(options), name, "s3://b/c"])


def _required(options: dict[str, object]) -> list[str]:
    required = [name for name, option in options.items() if getattr(option, "required", False)]
    return [word for name in required for word in (name, "2018" if name == "--year" else "absent")]


def test_settings_and_variables_refuse_remote_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = "give a path on this machine, because remote storage"
    with pytest.raises(UserError, match=r"settings file memory://b/c\.yaml does not exist"):
        load_config("memory://b/c.yaml")
    (tmp_path / "c.yaml").write_text("prompt:\n  templates: gs://b/prompts.yaml\n")
    with pytest.raises(UserError, match=f"setting prompt.templates is gs://b/prompts.yaml; {remote}"):
        load_config(tmp_path / "c.yaml")
    monkeypatch.setenv("LLMGR_CACHE", "s3://b/cache")
    with pytest.raises(UserError, match=f"LLMGR_CACHE is s3://b/cache; {remote}"):
        cache_folder()
    with pytest.raises(UserError, match=f"--output s3:/b/run: {remote}"):
        require_writable(Path("s3://b/run"))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("S3://b/ds", "give s3://, gs://, hdfs:// or memory://"),
        (" gs://b", "give s3://, gs://, hdfs:// or memory://"),
        ("dbfs:/mnt/x", "give s3://, gs://, hdfs:// or memory://"),
        ("https://host/x", "give s3://, gs://, hdfs:// or memory://"),
        ("s3:/b/ds", "give s3://, gs://, hdfs:// or memory://"),
        ("s3://", "give s3://BUCKET/FOLDER"),
        ("hdfs:///data", "give hdfs://HOST/FOLDER"),
        ("s3://b/*.parquet", r"leave out '\*'"),
        ("s3://b/a\nb", "leave out"),
        ("s3://b/../c", r"leave out \. and \.\."),
        ("s3://key:secret@b/c", r"^s3://\.\.\.; leave out keys and options"),
        ("s3://b/c?token=secret", r"^s3://\.\.\.; leave out keys and options"),
        ("file:///data/a", "leave out file://"),
    ],
)
def test_a_url_that_names_no_folder_is_refused(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        storage_path(url)
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match=problem):
        as_path(url)


def test_a_remote_path_is_used_as_a_path() -> None:
    folder = as_path("s3://bucket/a//b/")
    assert str(folder) == "s3://bucket/a/b"
    assert str((folder / "x" / "y").relative_to(folder)) == "x/y"
    assert str(folder.parent / "c.d" / "e") == "s3://bucket/a/c.d/e"
    assert (folder / "x" / ".." / "y").resolve() == folder / "y"
    assert not (folder / "../../../x").resolve().is_relative_to(folder)
    assert pickle.loads(pickle.dumps(folder)) == folder  # noqa: S301 (this test wrote it)
    assert str(pickle.loads(pickle.dumps(folder))) == str(folder)  # noqa: S301
    assert as_path(folder) is folder
    assert as_path("data/a") == Path("data/a")


def test_a_message_about_a_path_with_a_line_break_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare", "--items", "a\nb", "--sessions", "x", "--output", "out\0put"])
    with pytest.raises(SystemExit) as stop:
        run_cli(main_of("llmgr_rec.prepare"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "null character" in said
