"""What each command takes from an earlier one, and what it makes again after any change of its inputs."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datagen.csv import main as convert
from llmgr_rec.config import Config
from llmgr_rec.data.catalog import Catalog
from llmgr_rec.data.dataset import Dataset
from llmgr_rec.data.preparation import pipeline
from llmgr_rec.data.preparation.pipeline import prepare_dataset
from llmgr_rec.data.preparation.settings import PrepareSettings
from llmgr_rec.data.preparation.summary import summary_lines
from llmgr_rec.modules import language_model
from llmgr_rec.remote_path import as_path
from llmgr_rec.result_cache import files_below
from llmgr_rec.storage import cached_tokens
from llmgr_rec.storage.model_factory import ModelFactory
from llmgr_rec.storage.pretrained import load_decoder
from llmgr_rec.training import neighbors
from llmgr_rec.training.text_embeddings import embed_catalog
from tests.data.prepare_inputs import Click, write_interactions, write_items
from tests.small_run import ONE_RANK, prepare_small, small_run

CLICKS: list[Click] = [(f"u{user}", f"i{(user + n) % 7}", n) for user in range(6) for n in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMGR_CACHE_GB", "1")
    return tmp_path / "cache" / "results"


def content(folder: Path) -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in files_below(folder).items()}


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """Counts the calls of a function."""
    calls: list[str] = []
    work: Callable[..., Any] = getattr(module, name)

    def count(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return work(*arguments, **options)

    monkeypatch.setattr(module, name, count)
    return calls


def test_a_data_set_is_prepared_once_from_equal_files_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch, pipeline, "_run_steps")

    def prepare(name: str, clicks: list[Click] = CLICKS, title: str = "title", **settings: Any) -> Path:
        raw, output = tmp_path / f"raw-{name}", tmp_path / name
        raw.mkdir()
        interactions = write_interactions(raw / "interactions.parquet", clicks)
        ids = [f"i{item}" for item in range(7)]
        items = write_items(raw / "items.parquet", ids, title=[f"{title} {item}" for item in ids])
        base = PrepareSettings(
            str(output), interactions=str(interactions), items=str(items), min_interactions=0, threads=1
        )
        lines.append(summary_lines(prepare_dataset(replace(base, **settings))))
        return output

    lines: list[list[str]] = []
    first = content(prepare("first"))
    assert content(prepare("again")) == first
    assert content(prepare("threads", memory_gb=0.5, threads=2)) == first
    assert len(calls) == 1
    assert lines[0] == lines[1] == lines[2]
    prepare("clicks", [*CLICKS, ("u6", "i0", 1), ("u6", "i1", 2), ("u6", "i2", 3)])
    prepare("items", title="name")
    prepare("settings", max_length=3)
    assert len(calls) == 4
    monkeypatch.setenv("LLMGR_CACHE_GB", "0")
    assert content(prepare("disabled")) == first
    assert len(calls) == 5


def test_a_conversion_is_made_once_and_says_what_it_dropped_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def messages(name: str, log: str, *options: str) -> list[str]:
        file = tmp_path / "log.csv"
        file.write_text(log)
        caplog.clear()
        columns = ["--user_column", "who", "--item_column", "sku", "--time_column", "at", "--bad_rows", "drop"]
        convert(["--interactions", str(file), *columns, *options, "--output", str(tmp_path / name)])
        return [record.getMessage() for record in caplog.records if record.name.startswith("datagen")]

    log = "at,who,sku\n1,u,a\n2,u,b\nnever,u,c\n"
    first = messages("first", log)
    assert any("1 of 3" in line or "never" in line for line in first), first
    assert "taking" not in caplog.text
    assert messages("again", log) == first
    assert "taking the converted files" in caplog.text
    assert content(tmp_path / "again") == content(tmp_path / "first")
    messages("rows", f"{log}3,v,a\n")
    assert "taking" not in caplog.text
    messages("options", log, "--duplicates", "keep")
    assert "taking" not in caplog.text


def test_item_texts_are_tokenized_and_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenized = counted(monkeypatch, cached_tokens, "tokenize_items")
    encoded = counted(monkeypatch, language_model, "embed_item_texts")
    catalog, settings = small_run().catalog, Config()
    settings.llm.name_or_path = "random-tiny"

    def embed(
        run: str, source: Catalog = catalog, layers: int = 1, weights: str = "hash", folder: Path = tmp_path
    ) -> torch.Tensor:
        tokens = ModelFactory().item_tokens(settings, source)
        decoder = load_decoder("random-tiny", layers, "float32")
        embeddings = embed_catalog(decoder, tokens, ONE_RANK, folder / run, weights)
        return embeddings.read(range(tokens.num_rows), range(embeddings.width))

    first = embed("first")
    assert torch.equal(embed("again"), first)
    assert torch.equal(embed("remote", folder=as_path("memory://reused")), first)
    assert (len(tokenized), len(encoded)) == (1, 1)
    settings.prompt.max_text_tokens = 3
    assert not torch.equal(embed("tokens"), first)
    assert (len(tokenized), len(encoded)) == (2, 2)
    embed("layers", layers=2)
    embed("weights", weights="other")
    assert (len(tokenized), len(encoded)) == (2, 4)
    raw = tmp_path / "raw"
    raw.mkdir()
    names = [f"i{item}" for item in range(7)]
    files = write_interactions(raw / "interactions.parquet", CLICKS), write_items(raw / "items.parquet", names)
    prepare_dataset(
        PrepareSettings(
            str(tmp_path / "data"), interactions=str(files[0]), items=str(files[1]), min_interactions=0, threads=1
        )
    )
    embed("texts", Catalog.load(tmp_path / "data"))
    assert (len(tokenized), len(encoded)) == (3, 5)


def test_neighbors_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = counted(monkeypatch, neighbors, "_compute")
    small = small_run()

    def similarities(run: str, name: str = "text_knn", k: int = 5, dataset: Dataset = small.dataset) -> Any:
        catalog = Catalog.load(dataset.path)
        (found,) = neighbors.neighbor_scores([name], k, dataset, catalog, ONE_RANK, tmp_path / run)
        return found.similarity_VR.toarray()

    before = content(small.dataset.path)
    first = similarities("first")
    assert (similarities("again") == first).all()
    assert content(small.dataset.path) == before, "a data set may be read-only"
    assert len(computed) == 1
    similarities("more", k=6)
    similarities("other", name="item_knn")
    similarities("data", dataset=prepare_small(tmp_path / "data", seed=1))
    assert len(computed) == 4
    # Its code may change.
    for run in ("own", "own again"):
        similarities(run, name="llmgr_rec.baselines.builders:_item_knn")
    assert len(computed) == 6
