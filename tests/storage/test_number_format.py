"""`auto` is the number format whose products are faster, and all processes agree on it."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from llmgr_rec.cache import cache_folder
from llmgr_rec.storage import number_format
from llmgr_rec.storage.number_format import measure_gain_of_bfloat16, resolve_dtype
from llmgr_rec.storage.pretrained import load_decoder


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, on a processor with instructions for bfloat16."""
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(number_format, "_has_bfloat16", lambda: True)
    number_format._gain_of_bfloat16.cache_clear()
    yield tmp_path / "cache"
    number_format._gain_of_bfloat16.cache_clear()


def measured(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    number_format._gain_of_bfloat16.cache_clear()
    monkeypatch.setattr(number_format, "measure_gain_of_bfloat16", lambda: gain)


def test_a_named_format_is_taken() -> None:
    assert resolve_dtype("float32") == torch.float32
    assert resolve_dtype("bfloat16") == torch.bfloat16


@pytest.mark.parametrize(("gain", "expected"), [(2.0, torch.bfloat16), (1.1, torch.float32), (0.6, torch.float32)])
def test_auto_is_the_faster_format(
    cache: Path, monkeypatch: pytest.MonkeyPatch, gain: float, expected: torch.dtype
) -> None:
    measured(monkeypatch, gain)
    assert resolve_dtype("auto") == expected
    assert load_decoder("random-tiny", dtype="auto").dtype == expected


def test_a_processor_without_instructions_for_bfloat16_is_not_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 2.0)
    monkeypatch.setattr(number_format, "_has_bfloat16", lambda: False)
    assert resolve_dtype("auto") == torch.float32
    assert not cache.exists()


def test_later_processes_agree_with_the_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 2.0)
    assert resolve_dtype("auto") == torch.bfloat16
    measured(monkeypatch, 0.5)
    assert resolve_dtype("auto") == torch.bfloat16


def test_of_processes_that_measure_at_once_all_take_one_result(cache: Path) -> None:
    file = cache / "gain.json"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        kept = pool.starmap(number_format._publish, [(file, gain) for gain in (0.5, 1.0, 2.0, 4.0)])
    assert len(set(kept)) == 1
    assert [path.name for path in cache.iterdir()] == ["gain.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"gain_of_bfloat16": null}'])
def test_a_damaged_measurement_is_repeated(cache: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    measured(monkeypatch, 2.0)
    resolve_dtype("auto")
    (file,) = (cache / "number_formats").iterdir()
    file.write_text(content)
    measured(monkeypatch, 4.0)
    assert resolve_dtype("auto") == torch.bfloat16
    assert "4.0" in file.read_text()


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file")
    measured(monkeypatch, 2.0)
    assert resolve_dtype("auto") == torch.bfloat16


def test_the_measurement_is_a_ratio_of_times() -> None:
    assert 0.001 < measure_gain_of_bfloat16() < 1000


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMGR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LLMGR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llmgr_rec"
