"""Pages are run from top to bottom: the tutorial, the pages that go on from it, and the errors of the FAQ."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fastapi.testclient import TestClient

from llmgr_rec import Recommender
from llmgr_rec.errors import UserError
from llmgr_rec.serving.app import Service, ServiceSettings, make_app
from tests.documented import ROOT, documented_pages, entry_point, fences, lines_of, run_page, run_programs
from tests.small_run import small_run

DOCS = ROOT / "docs"
# Programs on pages are run here, or by the test that is named.
RUN_HERE = {f"docs/{name}.md" for name in ("tutorial", "every-day", "cold-items", "spark", "sharding")}
RUN_ELSEWHERE = {
    "docs/embedding.md": "tests/examples/test_rank_with_sessions.py",
    "docs/explaining.md": "tests/test_python_api.py",
    "docs/export.md": "tests/scoring/test_program_export.py",
    "docs/extending/baseline.md": "tests/test_extensions.py",
    "docs/extending/encoder.md": "tests/test_extensions.py",
    "docs/extending/head.md": "tests/test_extensions.py",
    "docs/python.md": "tests/test_python_api.py",
    "README.md": "tests/test_python_api.py",
}


def answer(run: str) -> Callable[[str], None]:
    """Answers the requests that a page sends with curl, as the service of a run does."""

    def run_line(line: str) -> None:
        words = shlex.split(line)
        if words[:3] == ["python", "-m", "llmgr_rec.serve"]:
            assert words[3:] == ["--run", run]
            return
        assert words[0] == "curl"
        service = Service(ServiceSettings(Path(run)), Recommender.load)
        with TestClient(make_app(service), base_url="http://127.0.0.1:8000") as client:
            path = "/" + words[-1].split("/", 3)[3]
            reply = client.post(
                path, content=words[words.index("-d") + 1], headers={"Content-Type": "application/json"}
            )
            assert reply.status_code == 200, reply.text
            assert len(reply.json()["lists"][0]["item_ids"]) == 3

    return run_line


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the tutorial was run."""
    folder = tmp_path_factory.mktemp("tutorial")
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    try:
        run_page(DOCS / "tutorial.md", answer("shop/run"))
        yield folder
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)


def test_the_tutorial_ends_with_a_good_recommender_and_a_report(shop: Path) -> None:
    metrics = json.loads((shop / "shop" / "metrics.json").read_text())["test"]
    assert metrics["sbr"]["ndcg@20"] > 1.2 * metrics["item_knn"]["ndcg@20"]
    assert (shop / "shop" / "report" / "index.html").stat().st_size > 10_000
    assert pq.read_table(shop / "shop" / "scores").num_rows == 3


ERRORS = [
    (command.strip(), message.strip())
    for (language, command), (_, message) in zip(fences(DOCS / "faq.md"), fences(DOCS / "faq.md")[1:], strict=False)
    if language == "sh"
]


@pytest.mark.parametrize(("command", "message"), ERRORS, ids=[re.sub(r"\W+", "-", one[1])[:50] for one in ERRORS])
def test_the_faq_has_the_message_of_each_command(
    shop: Path, command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = shlex.split(command)
    before = sorted(path.name for path in shop.iterdir())
    with pytest.raises(UserError) as raised:
        entry_point(words[2]).main(words[3:])
    assert f"error: {raised.value}" == message
    assert sorted(path.name for path in shop.iterdir()) == before


def run_link(line: str) -> None:
    """Runs a command that makes a link."""
    assert line.startswith("ln ")
    subprocess.run(shlex.split(line), check=True, timeout=30)


@pytest.mark.slow
def test_a_day_makes_a_new_run_and_new_scores_and_is_served(shop: Path) -> None:
    Path("shop/current").symlink_to(".")
    service = Service(ServiceSettings(Path("shop/current/run"), reload_s=0.1), Recommender.load)
    with TestClient(make_app(service), base_url="http://127.0.0.1:8000") as client:
        yesterday = client.get("/health").json()
        run_page(DOCS / "every-day.md", run_link)
        deadline = time.monotonic() + 60
        while client.get("/health").json() == yesterday and time.monotonic() < deadline:
            time.sleep(0.1)
        assert client.get("/health").json() != yesterday
    assert pq.read_table(shop / "shop" / "2026-11-03" / "scores").num_rows == 3
    assert (shop / "shop" / "current" / "run" / "export" / "sbr").is_dir()
    assert (shop / "shop" / "2026-11-03" / "run" / "init_from.json").is_file()
    assert (shop / "shop" / "noon" / "export" / "sbr").is_dir()


@pytest.mark.slow
def test_cold_items_are_kept_and_measured(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_page(DOCS / "cold-items.md")
    rates = dict(re.findall(r"^(item_knn|text_knn|sbr) ([\d.]+)$", capsys.readouterr().out, re.MULTILINE))
    assert float(rates["item_knn"]) == 0
    assert float(rates["text_knn"]) > 0
    assert float(rates["sbr"]) > 0


class SparkFrame:
    """Stand-in for a data frame of Spark, which checks that a function keeps its word about its output."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def parquet(self, path: str) -> Any:
        pq.write_table(self.table, path)

    @property
    def write(self) -> "SparkFrame":
        return self

    def mapInArrow(self, function: Callable[..., Any], schema: str) -> "SparkFrame":
        types = {"string": pa.string(), "boolean": pa.bool_()}
        types |= {"array<string>": pa.list_(pa.string()), "array<float>": pa.list_(pa.float32())}
        promised = pa.schema([(name, types[kind]) for name, kind in (one.split() for one in schema.split(", "))])
        # Spark passes the rows of a partition in several batches.
        table = pa.Table.from_batches(list(function(iter(self.table.to_batches(max_chunksize=2)))))
        assert table.schema.equals(promised)
        return SparkFrame(table)


def test_a_spark_job_recommends(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str) -> SparkFrame:
        return SparkFrame(pq.read_table(path))

    session = types.SimpleNamespace(read=types.SimpleNamespace(parquet=read))
    builder = types.SimpleNamespace(getOrCreate=lambda: session)
    module = types.ModuleType("pyspark.sql")
    module.SparkSession = types.SimpleNamespace(builder=builder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyspark", types.ModuleType("pyspark"))
    monkeypatch.setitem(sys.modules, "pyspark.sql", module)
    run_programs(DOCS / "spark.md")
    found, scored = pq.read_table("shop/spark-scores"), pq.read_table("shop/scores")
    assert found["item_ids"].to_pylist() == scored["item_ids"].to_pylist()


def test_a_bundle_and_its_adapter_are_loaded_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = small_run().run
    base = json.loads((run / "export/behave/lora/adapter_config.json").read_text())["base_model_name_or_path"]
    for name, target in (("RUN", run), ("runs/ml/run", run), ("path/to/model", base)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(target)
    names: dict[str, Any] = {}
    for language, content in fences(DOCS / "sharding.md"):
        if language == "python":
            # The small run keeps fewer layers.
            exec(content.replace("num_hidden_layers=4", "num_hidden_layers=1"), names)
    assert names["bundle"].catalog.num_items == 60
    assert any("lora_B" in name for name, _ in names["model"].named_parameters())


# Pages with commands on a data set runs/ml/dataset and a run of all stages, runs/ml/run.
ML_PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("concepts", "running", "data", "language-model", "paper-recipe")),
]
ML_PAGES += [f"docs/extending/{name}.md" for name in ("encoder", "baseline", "prompt", "head")]
ML_COMMANDS = {f"llmgr_rec.{name}" for name in ("train", "evaluate", "score", "report")}
# What is added to each training, so that it takes seconds.
SHORT = ["--sbr.epochs", "1", "--tables.dim", "16", "--runtime.device", "cpu", "--runtime.threads_per_rank", "1"]
SHORT_PROMPTS = ["--align.max_steps", "1", "--behave.max_steps", "1", "--llm.lora_rank", "2"]
TINY_MODEL = ["--llm.name_or_path", "random-tiny"]


def small_copy(folder: Path) -> None:
    """Puts the shared data set and run where the pages have theirs, and a tiny language model."""
    small = small_run()
    shutil.copytree(small.dataset.path, folder / "runs/ml/dataset")
    shutil.copytree(small.run, folder / "runs/ml/run")
    adapter = json.loads((small.run / "export/behave/lora/adapter_config.json").read_text())
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/model").symlink_to(adapter["base_model_name_or_path"])
    (folder / "examples").symlink_to(ROOT / "examples")


def ml_commands(page: str) -> Iterator[list[str]]:
    """Module and arguments of each command of a page on the data set; TorchX starts its module on one rank here."""
    for line in (line for language, content in fences(ROOT / page) if language == "sh" for line in lines_of(content)):
        words = shlex.split(line, comments=True)
        if words[:2] == ["torchx", "run"] and "--" in words and "llmgr_rec.train" in words:
            words = ["python", "-m", "llmgr_rec.train", *words[words.index("--") + 1 :]]
        if words[:2] == ["python", "-m"] and words[2] in ML_COMMANDS and "runs/ml" in line:
            yield words[2:]


def make_reported(words: list[str]) -> None:
    """Makes the runs and metrics that a report names and that other pages make."""
    values = {
        name: [words[place + 1] for place, word in enumerate(words) if word == name] for name in ("--run", "--metrics")
    }
    for run, metrics in zip(values["--run"], values["--metrics"], strict=True):
        if not Path(run).exists():
            shutil.copytree("runs/ml/run", run)
        if not Path(metrics).exists():
            entry_point("llmgr_rec.evaluate").main(
                [
                    "--run",
                    run,
                    "--dataset",
                    "runs/ml/dataset",
                    "--output",
                    metrics,
                    "--models",
                    "popularity,item_knn,sbr",
                ]
            )


@pytest.mark.slow
@pytest.mark.parametrize("page", ML_PAGES)
def test_commands_of_a_page_run_on_a_small_data_set(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_copy(tmp_path)
    monkeypatch.chdir(tmp_path)
    number = 0
    for module, *words in ml_commands(page):
        output = Path(words[words.index("--output") + 1])
        if module == "llmgr_rec.report":
            make_reported(words)
        if module == "llmgr_rec.train":
            if output == Path("runs/ml/run"):
                # The run is here already.
                output, words = Path("runs/ml/again"), ["runs/ml/again" if one == str(output) else one for one in words]
            # The page says to remove it before a run is exported again.
            shutil.rmtree(output / "export", ignore_errors=True)
            prompts = [*SHORT_PROMPTS, *([] if "--llm.name_or_path" in words else TINY_MODEL)]
            words += [*SHORT, *(prompts if "--config" in words else [])] if "--resume" not in words else []
        entry_point(module).main(words)
        assert output.exists()
        number += 1
    assert number, "the page has no such command"


def test_every_program_on_a_page_is_run() -> None:
    with_programs = {
        str(page.relative_to(ROOT)) for page in documented_pages() if any(one == "python" for one, _ in fences(page))
    }
    assert with_programs == RUN_HERE | set(RUN_ELSEWHERE)
    for page, test in RUN_ELSEWHERE.items():
        text = (ROOT / test).read_text()
        assert Path(page).name in text or Path(page).stem in text, f"{test} does not name {page}"
