"""Seconds and memory of prepare on a generated log, by number of clicks and memory limit.

```sh
python -m benchmarks.preparation --clicks 5000000 --memory_gb 2
```
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import duckdb

from benchmarks.commands import run_module
from benchmarks.harness import benchmark_parser, write_report
from llmgr_rec.cli import parse_args, run_cli
from llmgr_rec.errors import UserError
from llmgr_rec.paths import LocalPath

# The first thousandth of the items has a tenth of the clicks.
_SKEW = 3
_SECONDS_OF_YEAR = 31_536_000


def main(argv: Sequence[str]) -> None:
    """Parses the arguments, generates a log, and prepares it."""
    parser = benchmark_parser("preparation", "Measures seconds and memory of prepare on a generated log.")
    parser.add_argument("--clicks", type=int, default=5_000_000, help="Rows of the log.")
    parser.add_argument("--memory_gb", type=float, default=2.0, help="Memory limit of DuckDB, in GiB.")
    parser.add_argument("--options", type=str, default="", help="More options of prepare, separated by spaces.")
    parser.add_argument("--folder", type=LocalPath, help="Folder for log and data set; default: a temporary one.")
    args = parse_args(parser, argv).as_dict()
    if args["clicks"] < 1000:
        raise UserError("--clicks must be 1000 or more")
    with tempfile.TemporaryDirectory(prefix="llmgr-preparation-", dir=args["folder"]) as folder:
        log, output = Path(folder) / "log.parquet", Path(folder) / "dataset"
        write_log(log, args["clicks"])
        words = ["--interactions", str(log), "--output", str(output), "--memory_gb", f"{args['memory_gb']:g}"]
        words += ["--threads", str(args["threads"] or 0), *args["options"].split()]
        cost = run_module("llmgr_rec.prepare", words)
        size_mib = sum(file.stat().st_size for file in output.rglob("*.parquet")) / 2**20
        log_mib = log.stat().st_size / 2**20
    print(
        f"{args['clicks']:,} clicks ({log_mib:,.0f} MiB of Parquet): {cost.seconds:.0f} s, "
        f"{args['clicks'] / cost.seconds:,.0f} clicks/s, {cost.process_mib:,.0f} MiB of memory at most; "
        f"data set {size_mib:,.0f} MiB"
    )
    write_report(args["output"], args, {**vars(cost), "log_mib": log_mib, "dataset_mib": size_mib})


def write_log(path: Path, clicks: int) -> None:
    """Writes a log of users with 20 clicks on average, in random order, on a 50th as many items as clicks.

    Args:
        path: File to write.
        clicks: Number of rows.
    """
    users, items = max(clicks // 20, 1), max(clicks // 50, 1)

    def drawn(seed: int) -> str:
        # Not hash(i, seed): its values for two seeds are functions of each other.
        return f"(hash(3 * i + {seed}) / 18446744073709551616.0)"

    columns = (
        f"'user' || CAST(floor({users} * pow({drawn(0)}, 1.5)) AS BIGINT) AS user_id, "
        f"'item' || CAST(floor({items} * pow({drawn(1)}, {_SKEW})) AS BIGINT) AS item_id, "
        f"1700000000 + CAST(floor({_SECONDS_OF_YEAR} * {drawn(2)}) AS BIGINT) AS timestamp"
    )
    with duckdb.connect() as connection:
        connection.execute(f"COPY (SELECT {columns} FROM range({clicks}) r(i)) TO '{path}' (FORMAT parquet)")


if __name__ == "__main__":
    run_cli(main)
