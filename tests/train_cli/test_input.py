"""The train command: data and settings that it refuses in one line, before it makes a folder or waits for ranks."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmgr_rec import train
from llmgr_rec.config_file import load_config, save_config
from tests.train_cli.conftest import Refused
from tests.training.damage import (
    PART,
    edit_manifest,
    no_sessions,
    no_text,
    of_another_catalog,
    rewrite,
    set_first_click,
    set_target,
    truncate,
    truncate_silently,
    without_one_text,
)
from tests.training.small_training import PROMPTS, small_dataset

# Templates for one pass; those of the shared settings begin with text.
ONE_PASS = ("--prompt.templates", "compact")

# Data


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: shutil.rmtree(d),
            r"dataset is .* prepared data set: it has no manifest\.json; .* llmgr_rec\.prepare",
        ),
        (lambda d: (d / "manifest.json").unlink(), r"dataset is .* prepared data set: it has no manifest\.json"),
        (lambda d: (d / "manifest.json").write_text("{"), r"manifest\.json is not valid JSON"),
        (lambda d: edit_manifest(d, lambda m: m.update(format_version=9)), "format_version 9, this version reads 1"),
        (lambda d: (d / PART).unlink(), r"part-00000\.parquet is missing though manifest\.json lists it"),
        (truncate, r"part-00000\.parquet has [\d,]+ bytes but manifest\.json says [\d,]+; .* llmgr_rec\.prepare"),
        (truncate_silently, r"part-00000\.parquet is truncated or .* Parquet file .* llmgr_rec\.prepare"),
        (
            lambda d: rewrite(d, PART, lambda table: set_first_click(table, 64)),
            r"part-00000\.parquet, row group 0: column items h\w+ item index 64, but the catalog has items 0 to 63",
        ),
        (
            lambda d: rewrite(d, PART, lambda table: set_target(table, -3)),
            r"part-00000\.parquet, row group 0: column target h\w+ item index -3",
        ),
        (
            lambda d: rewrite(d, "valid/part-00000.parquet", lambda table: set_target(table, 64)),
            r"valid/part-00000\.parquet, row group 0: column target h\w+ item index 64",
        ),
        (lambda d: rewrite(d, PART, lambda t: t.drop_columns(["target"])), r"part-00000\.parquet has no column target"),
        (no_sessions, "dataset has no training sessions; prepare"),
        (of_another_catalog, r"items\.parquet is not the catalog .*manifest\.json.* llmgr_rec\.prepare"),
        (no_text, r"items\.parquet has no titles, .* stage align .*; prepare .* or set align\.epochs to 0"),
        (
            lambda d: rewrite(d, "items.parquet", without_one_text),
            r"items\.parquet: 1 items? ha\w+ no text in title, category, .* item_id 'i0.*'; .* prompt\.text_fields",
        ),
    ],
)
def test_a_data_set_that_cannot_be_read_is_refused(
    refused: Refused, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(small_dataset(), dataset)
    damage(dataset)
    assert re.search(message, refused(dataset=dataset))


def test_rows_that_are_prefixes_are_not_trained_in_one_pass(refused: Refused, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(small_dataset(), dataset)
    edit_manifest(dataset, lambda manifest: manifest.update(prefix_augmentation=[]))
    for group in ("encoder", "prompt"):
        said = refused(f"--{group}.one_pass", "true", "--encoder.name", "sasrec", *ONE_PASS, dataset=dataset)
        assert re.search(
            rf"the training rows of .*dataset are .*prefixes.*; set {group}\.one_pass to (auto or )?false", said
        )


def test_text_is_not_required_where_no_stage_uses_it(refused: Refused, tmp_path: Path) -> None:
    """The refusal is then the one of the last check: tables that do not fit."""
    dataset = tmp_path / "dataset"
    shutil.copytree(small_dataset(), dataset)
    no_text(dataset)
    said = refused("--tables.memory_per_rank_gb", "1e-9", dataset=dataset, stage="sbr")
    assert re.search(r"stage sbr: table item_id .* --tables\.memory_per_rank_gb", said)


# Settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sbr:\n  batchsize: 3\n", r"unknown setting sbr\.batchsize .*c\.yaml.*did you mean sbr\.batch_size\?"),
        ("tabels:\n  dim: 8\n", r"unknown setting tabels\.dim .*c\.yaml.*did you mean tables\.dim\?"),
        ("tables:\n  dim: wide\n", r"setting tables\.dim: .*wide.*c\.yaml"),
        ("tables:\n  sharding: diagonal\n", r"tables\.sharding.*diagonal.*c\.yaml"),
        ("sbr: [\n", r"c\.yaml"),
    ],
)
def test_a_mistake_in_the_settings_file_is_named(refused: Refused, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert re.search(message, refused(config=tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sbr.epoch", "3"], r"unknown option --sbr\.epoch, did you mean sbr\.epochs\?"),
        (["--outptu", "x"], r"unknown option --outptu, did you mean output\?"),
        (["--sbr.epochs", "many"], r"setting sbr\.epochs: .*many"),
        (["--stage", "sbrr"], r"stage.*sbrr"),
        (["--llm.name_or_path", "/no/such/folder"], r"llm\.name_or_path: folder /no/such/folder does not exist; give"),
        (["--prompt.templates", "nowhere.yaml"], r"prompt\.templates: nowhere\.yaml is neither a readable file nor"),
        (["--sbr.batch_size", "-1"], r"setting sbr\.batch_size is -1; give 1 or more"),
        (["--behave.batch_size", "0"], r"setting behave\.batch_size is 0; give 1 or more"),
        (["--sbr.lr", "0"], r"setting sbr\.lr is 0\.0; give a number above 0"),
        (["--align.lr=-0.1"], r"setting align\.lr is -0\.1; give a number above 0"),
        (["--sbr.lr", ".nan"], r"setting sbr\.lr is nan; give a finite number"),
        (["--tables.lr", ".inf"], r"setting tables\.lr is inf; give a finite number"),
        (["--sbr.epochs", "-1"], r"setting sbr\.epochs is -1; give 0 or more"),
        (["--sbr.max_steps", "-1"], r"setting sbr\.max_steps is -1; give 0 or more"),
        (["--optimizer.warmup", "1.5"], r"setting optimizer\.warmup is 1\.5; give 1 at most"),
        (["--encoder.dropout", "1"], r"setting encoder\.dropout is 1\.0; give a number below 1"),
        (["--tables.dim", "18"], r"setting tables\.dim is 18; give a multiple of 4"),
        (["--tables.dim", "0"], r"setting tables\.dim is 0; give 4 or more"),
        (["--encoder.attention_heads", "3"], r"setting encoder\.attention_heads is 3; give a number that divides"),
        (
            ["--encoder.one_pass", "true", "--encoder.name", "stamp"],
            r"encoder\.one_pass is true, but encoder stamp does not support it; set encoder\.one_pass to auto or false",
        ),
        (
            ["--prompt.one_pass", "true", "--prompt.node_source", "encoder"],
            r"one_pass is true, but prompt\.node_source is encoder, .* later clicks; set prompt\.node_source to table",
        ),
        (
            ["--prompt.one_pass", "true", "--prompt.node_order", "unique"],
            r"one_pass is true, but prompt\.node_order is unique, .* later clicks; set prompt\.node_order to clicks",
        ),
        (
            ["--prompt.one_pass", "true", "--prompt.templates", "nodes-last.yaml"],
            r"prompt\.one_pass is true, but the first place\w* .* nodes-last\.yaml is not \{nodes\}, .* to compact",
        ),
        (["--runtime.log_every", "0"], r"setting runtime\.log_every is 0; give 1 or more"),
        (["--runtime.checkpoint_every", "-2"], r"setting runtime\.checkpoint_every is -2; give 0 or more"),
        (["--runtime.eval_batch_size", "0"], r"setting runtime\.eval_batch_size is 0; give 1 or more"),
        (["--runtime.device", "cuda"], r"runtime\.device is cuda and local rank 0 finds 0 GPUs; .*cpu"),
        (["--llm.lora_rank", "0"], r"setting llm\.lora_rank is 0; give 1 or more"),
        (["--prompt.text_fields", "[]"], r"setting prompt\.text_fields is \[\]; give at least one value"),
        (["--seed", "-1"], r"setting seed is -1; give 0 or more"),
        (["--tables.memory_per_rank_gb", "1e-9"], r"stage sbr: table .* --tables\.memory_per_rank_gb"),
        (["--align.batch_size", "1"], r"align\.batch_size is 1, which gives a rank fewer than two sessions"),
        (["--stage", "align", "--align.epochs", "0"], r"setting align\.epochs is 0, so --stage align has nothing"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    refused: Refused, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(refused.folder)
    Path("nodes-last.yaml").write_text(PROMPTS.replace("{nodes} {graph}", "{graph} {nodes}"))
    if "cuda" in words and __import__("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    assert re.search(message, refused(*words))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.yaml", r"settings file absent\.yaml does not exist; give"),
        ("quickstrat", r"no recipe named quickstrat, did you mean quickstart\?"),
    ],
)
def test_settings_that_are_not_there_are_named(refused: Refused, name: str, message: str) -> None:
    assert re.search(message, refused(config=name))


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ([], "quickstart"),
        (["--dataset", "shop"], "default"),
        (["--dataset", "shop", "--config", "paper"], "paper"),
        (["--config=paper", "--tables.dim", "8"], "paper"),
    ],
)
def test_without_settings_the_default_recipe_is_taken(
    monkeypatch: pytest.MonkeyPatch, words: list[str], recipe: str
) -> None:
    taken = []
    monkeypatch.setattr("llmgr_rec.training.train_run.train_run", lambda request: taken.append(request.config) or [])
    monkeypatch.setattr(train, "_synthetic_dataset", lambda: Path("synthetic"))
    train.main([*words, "--seed", "3"] if words else [])
    expected = load_config(recipe)
    expected.seed = 3 if words else 0
    expected.tables.dim = 8 if "--tables.dim" in words else expected.tables.dim
    assert taken == [expected]


@pytest.mark.parametrize("output", [["--output", "run"], ["--output=run"]])
def test_a_run_goes_on_with_its_own_settings_where_none_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    monkeypatch.setattr("llmgr_rec.training.train_run.train_run", lambda request: taken.append(request.config) or [])
    words = [*output, "--dataset", "shop", "--resume"]
    train.main(words)
    own = load_config("paper")
    own.tables.dim = 24
    Path("run").mkdir()
    save_config(own, "run/config.yaml")
    train.main(words)
    train.main([*words, "--config", "quickstart"])
    train.main([*words, "--tables.dim", "32"])
    assert taken[:3] == [load_config("default"), own, load_config("quickstart")]
    own.tables.dim = 32
    assert taken[3] == own


# The command itself


def command(settings: Path, output: Path, dataset: Path, *words: str) -> list[str]:
    module = ["-m", "llmgr_rec.train", "--config", str(settings), "--dataset", str(dataset), "--output", str(output)]
    return [sys.executable, *module, *words]


@pytest.mark.dist
def test_the_command_exits_2_with_one_line(settings: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(settings, tmp_path / "run", tmp_path / "nowhere"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'} is ")
    assert re.search(r"no manifest\.json; .* with python -m llmgr_rec\.prepare\n$", done.stderr)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_report_once_and_do_not_wait(settings: Path, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = command(settings, tmp_path / "run", small_dataset(), "--tables.memory_per_rank_gb", "1e-9")
    start = time.monotonic()
    done = subprocess.run([words[0], *launcher, *words[1:]], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert len(re.findall("^error: ", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert re.search(r"^error: stage sbr: table .* on 2 ranks", done.stderr, re.MULTILINE)
    assert "exitcode  : 2" in done.stderr
    assert time.monotonic() - start < 200, "a rank waited for another"
    assert list(tmp_path.iterdir()) == []
