"""prepare on published data sets with known counts, and its memory on ten million clicks."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from tests.data.prepare_inputs import Prepared, prepare

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"


def prepare_real(name: str, into: Path, **settings: Any) -> Prepared:
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    interactions, items = (str(folder / f"{kind}.parquet") for kind in ("interactions", "items"))
    return prepare(into, interactions=interactions, items=items, **settings)


@pytest.mark.real_data
def test_beauty_has_the_published_counts(tmp_path: Path) -> None:
    result = prepare_real("amazon_beauty_2014_5core", tmp_path, min_interactions=5, max_length=300)
    manifest = result.dataset.manifest
    assert manifest.num_items == 12_101
    assert manifest.num_sessions == {"train": 22_363, "valid": 22_363, "test": 22_363}
    # 198,502 clicks less validation, test and the first click of each user.
    assert manifest.num_examples["train"] == 198_502 - 3 * 22_363
    assert manifest.has_text
    assert manifest.repeats == "exclude"
    assert set(manifest.features) == {"category", "word"}


@pytest.mark.real_data
def test_diginetica_restores_the_published_split(tmp_path: Path) -> None:
    # The longest session has 70 clicks; a shorter max_length would cut 35 of the training cases off.
    options: dict[str, Any] = {"split": "predefined", "prefix_augmentation": "all", "max_length": 70, "valid_share": 0}
    published = prepare_real("diginetica", tmp_path, **options).dataset.manifest
    assert published.num_items == 43_097
    assert published.num_sessions == {"train": 186_670, "valid": 0, "test": 15_963}
    assert published.num_examples == {"train": 719_470, "valid": 0, "test": 60_858}
    assert not published.has_text
    assert published.repeats == "allow"
    assert published.repeat_counts["test"].target_share > 0.2


@pytest.mark.real_data
def test_movielens_keeps_every_user(tmp_path: Path) -> None:
    result = prepare_real("ml100k", tmp_path, min_interactions=5)
    manifest = result.dataset.manifest
    # Sessions of more than 50 clicks become several training rows, which use every click.
    assert manifest.num_sessions == {"train": 2_398, "valid": 943, "test": 943}
    assert manifest.click_use["unused"] == 0
    assert manifest.num_items == 1_349
    assert manifest.num_clicks == {"read": 100_000, "duplicates": 0, "consecutive_repeats": 0, "kept": 99_287}
    assert manifest.repeats == "exclude"
    assert manifest.features["category"]["num_embeddings"] == 19
    assert result.items[0]["title"] == "Toy Story (1995)"


@pytest.mark.slow
def test_ten_million_clicks_stay_under_three_gigabytes(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    clicks, items = tmp_path / "clicks.parquet", tmp_path / "items.parquet"
    with duckdb.connect() as connection:
        connection.execute(
            "COPY (SELECT 'user' || (hash(range) % 1000000) AS user_id, 'item' || CAST(floor(200000 * "
            "pow(hash(range + 77) % 1000003 / 1000003.0, 2)) AS INT) AS item_id, CAST(1500000000 + "
            f"hash(range + 99) % 100000000 AS BIGINT) AS timestamp FROM range(10000000)) TO '{clicks}' (FORMAT parquet)"
        )
        connection.execute(
            "COPY (SELECT 'item' || range AS item_id, 'title of ' || range AS title, 'A > B' || (range % 100) AS "
            f"category FROM range(200001)) TO '{items}' (FORMAT parquet)"
        )
    words = ["--interactions", str(clicks), "--items", str(items), "--output", str(tmp_path / "dataset")]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "llmgr_rec.prepare", *words])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    gigabytes = usage.ru_maxrss * 1024 / 1e9
    record_property("peak_gb", round(gigabytes, 3))
    record_property("seconds", round(time.monotonic() - began, 1))
    assert process.returncode == 0
    assert gigabytes < 3
