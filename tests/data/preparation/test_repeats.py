"""Duplicate rows, consecutive repeats, and the measured shares that decide whether rankings exclude clicked items."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmgr_rec.data.preparation import duckdb_database
from llmgr_rec.data.preparation.duplicates import drop_duplicates, merge_consecutive_repeats
from llmgr_rec.data.preparation.summary import summary_lines
from llmgr_rec.data.repeats import RepeatCounts, decide_repeats
from llmgr_rec.errors import UserError
from tests.data.prepare_inputs import Click, Prepared, prepare, write_interactions, write_items

CLICKS = st.lists(
    st.tuples(
        st.sampled_from(["train_a", "train_b", "valid_c", "test_d", "test_e"]),
        st.sampled_from([f"i{n}" for n in range(25)]),
        st.integers(0, 12),
    ),
    min_size=4,
    max_size=40,
)
SPLITS: list[dict[str, Any]] = [
    {"split": "leave_one_out", "prefix_augmentation": "none"},
    {"split": "leave_one_out", "prefix_augmentation": "train", "max_length": 3},
    {"split": "leave_one_out", "hold_out_items": 0.3},
    {"split": "leave_one_out", "max_length": 2, "long_sessions": "split"},
    {"split": "temporal", "valid_share": 0.2, "test_share": 0.3, "prefix_augmentation": "all"},
    {"split": "predefined", "duplicates": "keep"},
]


def examples(result: Prepared, split: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """All histories with their targets, from the rows of a split."""
    for _, items, target in result.rows[split]:
        clicks = (*items, target)
        shortest = 1 if split in result.dataset.manifest.prefix_augmentation else len(items)
        yield from ((clicks[:n], clicks[n]) for n in range(shortest, len(clicks)))


def distinct(users: int = 200, clicks: int = 9) -> list[Click]:
    """A log of users who never click an item twice, all of them with some items in common."""
    return [(f"u{user}", f"i{(user + 3 * n) % 40}", n) for user in range(users) for n in range(clicks)]


def sessions(count: int, items: str, name: str = "v") -> list[Click]:
    """The same session, one item per letter, of several users."""
    return [(f"{name}{user}", item, n) for user in range(count) for n, item in enumerate(items)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(clicks=CLICKS, split=st.sampled_from(SPLITS))
def test_the_manifest_counts_what_the_rows_show(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[Click], split: dict[str, Any]
) -> None:
    try:
        result = prepare(tmp_path_factory.mktemp("prepare"), clicks, **split)
    except UserError:
        return
    manifest = result.dataset.manifest
    for name, counts in manifest.repeat_counts.items():
        found = list(examples(result, name))
        assert counts.targets == len(found) == manifest.num_examples[name]
        assert counts.repeated_targets == sum(target in history for history, target in found)
    if not manifest.held_out:
        drops = split.get("duplicates") != "keep"
        kept = set(clicks) if drops else clicks
        assert manifest.num_clicks["duplicates"] == len(clicks) - len(set(clicks))
        assert sum(counts.clicks for counts in manifest.repeat_counts.values()) == len(kept)
        per_pair = Counter((user, item) for user, item, _ in kept)
        repeated = sum(counts.repeated_clicks for counts in manifest.repeat_counts.values())
        assert repeated == sum(per_pair.values()) - len(per_pair)


def test_the_rule_goes_by_the_split_with_the_greatest_share_and_by_the_option() -> None:
    def counts(**repeated: int) -> dict[str, RepeatCounts]:
        return {split: RepeatCounts(100, 0, 100, targets) for split, targets in repeated.items()}

    assert decide_repeats("auto", counts(train=4, valid=4, test=4)) == "exclude"
    assert decide_repeats("auto", counts(train=0, valid=0, test=5)) == "allow"
    assert decide_repeats("auto", counts(train=5, valid=0, test=0)) == "allow"
    assert decide_repeats("auto", {"test": RepeatCounts(0, 0, 0, 0)}) == "exclude"
    assert decide_repeats("allow", counts(train=0)) == "allow"
    assert decide_repeats("exclude", counts(train=99)) == "exclude"


def test_some_repeats_do_not_decide_and_many_do(tmp_path: Path) -> None:
    def rule(clicks: list[Click], **options: Any) -> str:
        return prepare(
            tmp_path, clicks, output=str(tmp_path / f"{len(list(tmp_path.iterdir()))}"), **options
        ).dataset.manifest.repeats

    log = distinct()
    twice = [(user, item, 10 * n) for user, item, n in log] + [(user, item, 10 * n + 1) for user, item, n in log[::100]]
    assert rule(log) == rule(log + sessions(5, "abcad")) == rule(twice) == "exclude"
    # No training session has a repeat, but every test target is one.
    assert rule(sessions(50, "abca")) == "allow"
    assert rule(sessions(50, "abcdab")) == rule(sessions(50, "aabb")) == "allow"
    assert rule(log, repeats="allow") == "allow"
    assert rule(sessions(50, "abca"), repeats="exclude") == "exclude"


def test_duplicate_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    log = distinct()
    plain = prepare(tmp_path, log, output=str(tmp_path / "plain"), min_interactions=5)
    # A user with enough clicks only if the duplicates count.
    double = log[::3] + log[::-1] + sessions(1, "i", "w") * 5
    dropped = prepare(tmp_path, double, output=str(tmp_path / "dropped"), min_interactions=5)
    manifest = dropped.dataset.manifest
    assert (manifest.duplicates, manifest.num_clicks["duplicates"]) == ("drop", 604)
    assert {name: sorted(rows) for name, rows in dropped.rows.items()} == {
        name: sorted(rows) for name, rows in plain.rows.items()
    }
    lines = summary_lines(manifest)
    assert lines[1] == (
        "604 rows (25.1%) equal to another one in user, item and time: dropped; if times are coarser than clicks, keep "
        "them (--duplicates keep)"
    )
    assert lines[2].startswith("sessions and items with too few clicks: 1 of ")
    assert lines[4].startswith(
        "repeats (items the session has clicked before): clicks train 0.0%, valid 0.0%, test 0.0%"
    )
    kept = prepare(tmp_path, double, output=str(tmp_path / "kept"), duplicates="keep").dataset.manifest
    assert (kept.num_clicks["duplicates"], kept.num_clicks["kept"]) == (604, 2405)
    assert kept.repeats == "allow"
    assert summary_lines(kept)[1].endswith("time: kept")


def test_an_error_names_duplicates_that_may_be_its_reason(tmp_path: Path) -> None:
    without_times = [(user, item, 0) for user, item, _ in sessions(20, "ababab")]
    with pytest.raises(UserError, match=r"no train rows.*; 80 of 120 rows were dropped before.*use --duplicates keep"):
        prepare(tmp_path, without_times)
    assert prepare(tmp_path, without_times, duplicates="keep").dataset.manifest.repeats == "allow"
    with pytest.raises(UserError, match=r"lower --min_interactions \(0 disables the filter\)$"):
        prepare(tmp_path, sessions(20, "abc"), min_interactions=50, output=str(tmp_path / "other"))


def test_rows_of_sessions_and_rows_of_other_splits_are_no_duplicates(tmp_path: Path) -> None:
    pq.write_table(pa.table({"session_id": ["u", "v"], "items": [["a", "a", "b", "b"]] * 2}), tmp_path / "s.parquet")
    items = str(write_items(tmp_path / "items.parquet", ["a", "b"]))
    result = prepare(tmp_path, sessions=str(tmp_path / "s.parquet"), items=items, output=str(tmp_path / "sessions"))
    assert result.dataset.manifest.num_clicks["kept"] == 8
    clicks = [*sessions(2, "aab"), *sessions(2, "aab", "test")]
    labels = ["train"] * 6 + ["test"] * 6
    same_time = [(user, item, 0) for user, item, _ in clicks]
    file = write_interactions(tmp_path / "labels.parquet", same_time, split=labels)
    options = {"split": "predefined", "valid_share": 0, "items": items, "output": str(tmp_path / "labels")}
    assert prepare(tmp_path, interactions=str(file), **options).dataset.manifest.num_clicks["duplicates"] == 4


def test_consecutive_repeats_are_merged_until_there_are_none(tmp_path: Path) -> None:
    # Without x, which is too rare, two clicks on b are in a row.
    clicks = sessions(3, "aaabxbcdddeaf")
    clicks = [(user, "rare" + user if item == "x" else item, n) for user, item, n in clicks]
    merged = prepare(tmp_path, clicks, min_interactions=3, consecutive_repeats="merge", output=str(tmp_path / "merged"))
    assert merged.rows["test"] == [(f"v{user}", tuple("abcdea"), "f") for user in range(3)]
    manifest = merged.dataset.manifest
    assert manifest.num_clicks == {"read": 39, "duplicates": 0, "consecutive_repeats": 15, "kept": 21}
    assert "15 clicks on the item clicked just before: merged" in summary_lines(manifest)
    kept = prepare(tmp_path, clicks, min_interactions=3, output=str(tmp_path / "kept"))
    assert kept.rows["test"][0][1] == tuple("aaabbcdddea")


def test_repeats_count_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duckdb_database, "BATCH_ROWS", 2048)  # the smallest that DuckDB hands out
    more = sessions(3, "abbacde")
    counts = prepare(tmp_path, distinct(700) + more).dataset.manifest.repeat_counts
    assert counts["train"] == RepeatCounts(700 * 7 + 3 * 5, 6, 700 * 6 + 3 * 4, 6)


def test_a_repeat_of_a_held_out_item_is_none_in_training(tmp_path: Path) -> None:
    more = [(user, item, n) for user in "vw" for n, item in enumerate(["i90", "x", "i90", "y", "z", "i91", "i92"])]
    plain = prepare(tmp_path, distinct() + more, output=str(tmp_path / "plain"))
    cut = prepare(tmp_path, distinct() + more, hold_out_items=0.9, output=str(tmp_path / "cut"))
    assert plain.dataset.manifest.repeat_counts["train"].repeated_targets == 2
    assert not {item["train_count"] for item in cut.items if item["item_id"] == "i90"} - {0}
    assert cut.dataset.manifest.repeat_counts["train"].repeated_targets == 0


def test_duplicates_of_a_log_larger_than_the_memory_are_dropped(tmp_path: Path) -> None:
    database = duckdb_database.DuckDBDatabase(tmp_path, memory_gb=16 / 1024, threads=2)
    # Each click twice.
    click = "hash(i // 2) % 20000 AS user, hash(-1 - i // 2) % 8000 AS item, hash(i // 2 + 500000) % 30000000 AS time"
    database.create("events", f"SELECT {click}, i AS row, 0 AS phase FROM range(400000) clicks(i)")
    assert drop_duplicates(database) == 200_000
    database.create("events", "SELECT user, item // 4000 AS item, time, row, phase FROM events")
    merged = merge_consecutive_repeats(database)
    assert database.value("SELECT count(*) FROM events") == 200_000 - merged
    assert merged == pytest.approx((200_000 - 20_000) / 2, rel=0.02)
    database.close()
