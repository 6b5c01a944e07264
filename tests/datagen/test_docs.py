"""Every command of docs/data.md runs as it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from datagen.movielens import wheel_folder
from datagen.synthetic import oracle_hit_rate
from llmgr_rec.errors import UserError
from tests.datagen.dumps import json_lines, write
from tests.datagen.test_amazon import META_2014, META_2018, META_2023, OLD_REVIEWS, REVIEWS_2023

ROOT = Path(__file__).resolve().parents[2]
AHEAD = timezone(timedelta(hours=5, minutes=30))
PAGE = (ROOT / "docs" / "data.md").read_text()


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page takes for granted."""
    path = tmp_path_factory.mktemp("docs")
    write(path / "ml-1m/ratings.dat", "1::2::5::978300760\n")
    write(path / "ml-1m/movies.dat", "2::Jumanji (1995)::Adventure|Fantasy\n")
    write(path / "reviews_Beauty_5.json.gz", json_lines(OLD_REVIEWS))
    write(path / "meta_Beauty.json.gz", META_2014)
    write(path / "Luxury_Beauty_5.json.gz", json_lines(OLD_REVIEWS))
    write(path / "meta_Luxury_Beauty.json.gz", json_lines(META_2018))
    write(path / "All_Beauty.jsonl.gz", json_lines(REVIEWS_2023))
    write(path / "meta_All_Beauty.jsonl.gz", json_lines(META_2023))
    write(path / "log.csv", "at,who,sku\n2024-01-31,u,a\n")
    write(
        path / "products.csv", "sku,name,kind\na,Tea,Food > Drinks\n" + "".join(f"p{i},Cup {i},\n" for i in range(20))
    )
    # The newest click first, so that the order comes from the times.
    lines = [click for visit in range(3) for click in reversed(_clicks(visit))]
    write(path / "today.csv", "visit,sku,clicked_at\n" + "".join(lines))
    return path


def _clicks(visit: int) -> list[str]:
    """Eight clicks of a visit, oldest first, when clocks are put forward in New York, in three notations."""
    start = datetime(2024, 3, 10, 6, 58, tzinfo=UTC)
    items = [f"p{(visit * visit + 3 * n) % 20}" for n in range(8)]
    moments = [start + timedelta(seconds=30 * n, microseconds=n) for n in range(8)]
    texts = [
        (moment.strftime("%Y-%m-%d %H:%M:%S.%f"), moment.isoformat(), moment.astimezone(AHEAD).isoformat())[n % 3]
        for n, moment in enumerate(moments)
    ]
    return [f"v{visit},{item},{text}\n" for item, text in zip(items, texts, strict=True)]


@pytest.mark.parametrize("command", _commands())
def test_command_runs(folder: Path, command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "python"
    if "datagen.movielens" in words and "--input" not in words:
        try:
            wheel_folder()
        except UserError as error:
            pytest.skip(str(error))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TZ": "America/New_York"}
    line = [sys.executable, *words[1:]]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output = folder / words[words.index("--output") + 1]
    if "llmgr_rec.prepare" in words:
        assert json.loads((output / "manifest.json").read_text())["num_items"] > 0
    elif "--sessions" in words:
        sessions = pq.read_table(output / "sessions.parquet")["items"].to_pylist()
        assert sessions == [[click.split(",")[1] for click in _clicks(visit)] for visit in range(3)]
    else:
        assert sorted(path.name for path in output.iterdir()) == ["interactions.parquet", "items.parquet"]
        assert pq.read_metadata(output / "interactions.parquet").num_rows > 0


def test_table_of_the_oracle_is_true() -> None:
    rows = re.findall(r"\| `--items (\d+)`[^|]*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE)
    assert len(rows) == 4
    for items, *told in rows:
        rates = oracle_hit_rate(items=int(items))
        assert [f"{rate:.2f}" for rate in rates.values()] == told, items
