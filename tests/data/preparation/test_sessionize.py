"""Sessions cut from the logs of users where they were inactive."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmgr_rec.data.preparation.duration import nanoseconds_of
from llmgr_rec.errors import UserError
from llmgr_rec.prepare import main
from tests.data.prepare_inputs import Click, prepare, write_interactions, write_items

START = 1_700_000_000


def naive_sessions(clicks: list[Click], gap: int) -> dict[str, list[str]]:
    """Items of each session, in the order of the sessions' first rows; plain loops."""
    by_user = defaultdict(list)
    for row, (user, item, time) in enumerate(clicks):
        by_user[user].append((time, row, item))
    sessions: list[tuple[int, str, list[str]]] = []
    for user, rows in by_user.items():
        number, last = 0, None
        for time, row, item in sorted(rows):
            if last is None or time - last > gap:
                number += 1
                sessions.append((row, f"{user}/{number}", []))
            first, name, items = sessions[-1]
            sessions[-1] = (min(first, row), name, [*items, item])
            last = time
    return {name: items for _, name, items in sorted(sessions)}


@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    clicks=st.lists(
        # The user a/1 has the name of the first session of a.
        st.tuples(st.sampled_from(["a", "a/1", "b"]), st.sampled_from("wxyz"), st.integers(0, 40)),
        min_size=1,
        max_size=40,
    ),
    minutes=st.integers(1, 4),
)
def test_sessions_equal_the_naive_ones(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[Click], minutes: int
) -> None:
    clicks = [(user, item, START + 60 * minute) for user, item, minute in clicks]
    clicks += [("c", item, START) for item in "wxyz"]
    result = prepare(tmp_path_factory.mktemp("cut"), clicks, session_gap=f"{minutes}min", duplicates="keep")
    expected = naive_sessions(clicks, 60 * minutes)
    assert result.rows["test"] == [
        (name, tuple(items[:-1]), items[-1]) for name, items in expected.items() if len(items) > 1
    ]
    cut = result.dataset.manifest.session_gap
    assert (cut["unit"], cut["sessions"], cut["clicks"]) == ("seconds", len(expected), len(clicks))


@pytest.mark.parametrize(
    ("unit", "gap", "split"),
    [("s", "1800s", "temporal"), ("ms", "30min", "predefined"), ("us", "0.5h", "temporal"), ("ns", "30 min", "prefix")],
)
def test_each_split_takes_whole_sessions_in_each_unit(tmp_path: Path, unit: str, gap: str, split: str) -> None:
    # Ten sessions of each user, ten hours apart; the second click is exactly the gap after the first.
    factor = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    names = ["train_u", "train_v", "test_w"]
    clicks = [
        (user, item, (START + 36000 * number + seconds) * factor)
        for user in names
        for number in range(10)
        for item, seconds in (("a", 0), ("b", 1800), ("c", 1801))
    ]
    labels = [user.split("_")[0] for user, _, _ in clicks]
    path = write_interactions(tmp_path / "i.parquet", clicks, split=labels)
    items = write_items(tmp_path / "items.parquet", list("abc"))
    options: dict[str, Any] = {"split": "temporal" if split == "temporal" else "predefined", "valid_share": 0.2}
    options |= {"split_prefix": True} if split == "prefix" else {}
    options |= {"test_share": 0.2, "prefix_augmentation": "all", "session_gap": gap}
    result = prepare(tmp_path, interactions=str(path), items=str(items), **options)
    names = {part: [row[0] for row in rows] for part, rows in result.rows.items()}
    assert all(row[1:] == (("a", "b"), "c") for rows in result.rows.values() for row in rows)
    if split == "temporal":
        newest = [f"{user}/{number}" for user in ("train_u", "train_v", "test_w") for number in (9, 10)]
        assert names["test"] == newest
        assert sorted(names["valid"]) == sorted(f"{name.split('/')[0]}/{n}" for name in newest[::2] for n in (7, 8))
    else:
        assert names["test"] == [f"test_w/{number}" for number in range(1, 11)]
        assert names["valid"] == ["train_u/9", "train_u/10", "train_v/9", "train_v/10"]
    assert len(names["train"]) == {"temporal": 18}.get(split, 16)


def test_ties_in_time_keep_the_order_of_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "clicks"
    for name, items in (("b/x", "ab"), ("a/y", "cd"), ("c/w", "ef")):
        (folder / name).parent.mkdir(parents=True)
        columns = {"user_id": [7, 7], "item_id": list(items), "timestamp": pa.array([START, START], pa.timestamp("s"))}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=1)
    items = write_items(tmp_path / "items.parquet", list("abcdef"))
    result = prepare(tmp_path, interactions=str(folder), items=str(items), session_gap="1d", threads=4)
    assert result.rows["test"] == [("7/1", tuple("cdabe"), "f")]


def test_the_summary_says_what_was_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clicks = [("u", item, 1000 * (START + 86400 * day)) for day in (0, 2) for item in "abcd"]
    path = write_interactions(tmp_path / "i.parquet", clicks)
    items = write_items(tmp_path / "items.parquet", list("abcd"))
    words = ["--interactions", str(path), "--items", str(items), "--output", str(tmp_path / "o"), "--session_gap", "1d"]
    main([*words, "--min_interactions", "2"])
    expected = "1d: users 1, sessions 2, clicks per session 4.0, before filters (timestamps in milliseconds)\n"
    assert expected in capsys.readouterr().out
    with pytest.raises(UserError, match="--session_gap cuts a log of --interactions; --sessions are sessions already"):
        main([*words[2:], "--sessions", str(path)])


@pytest.mark.parametrize(
    ("times", "options", "message"),
    [
        (range(4), {}, "the unit of column timestamp is unclear, its numbers are from 0 to 3; .* --time_unit"),
        ([START, START, START * 1000, START], {}, "column timestamp is 3 in seconds and 1 in milliseconds"),
        (pa.array(range(4), pa.timestamp("s")), {"time_unit": "seconds"}, "column timestamp is not a number"),
    ],
)
def test_times_of_unknown_unit_are_refused(tmp_path: Path, times: Any, options: dict[str, Any], message: str) -> None:
    table = pa.table({"user_id": ["u"] * 4, "item_id": list("abcd"), "timestamp": times})
    pq.write_table(table, tmp_path / "i.parquet")
    items = str(write_items(tmp_path / "items.parquet", list("abcd")))
    with pytest.raises(UserError, match=message):
        prepare(tmp_path, interactions=str(tmp_path / "i.parquet"), items=items, **{"session_gap": "30min"} | options)
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(("factor", "unit"), [(1.0, "seconds"), (1.0, "auto"), (1000.0, "milliseconds")])
def test_the_unit_may_be_named_and_times_may_be_floats(tmp_path: Path, factor: float, unit: str) -> None:
    start = 0 if unit == "seconds" else START
    times = [factor * (start + seconds) for seconds in (0.25, 60.25, 120.25, 180, 240.25)]
    table = pa.table({"user_id": ["u"] * 5, "item_id": list("abcda"), "timestamp": times})
    pq.write_table(table, tmp_path / "i.parquet")
    items = str(write_items(tmp_path / "items.parquet", list("abcd")))
    options: dict[str, Any] = {"session_gap": "1min", "time_unit": unit, "items": items}
    result = prepare(tmp_path, interactions=str(tmp_path / "i.parquet"), **options)
    assert result.rows["test"] == [("u/1", ("a", "b", "c"), "d")]
    assert result.dataset.manifest.session_gap["unit"] == (unit if unit != "auto" else "seconds")


def test_durations() -> None:
    assert nanoseconds_of("30min", "--x") == nanoseconds_of("0.5h", "--x") == 1800 * 10**9
    assert nanoseconds_of(" 1 d ", "--x") == 86400 * 10**9
    for text in ("", "30", "30m", "-1d", "0s", "1e3s", "nan", "99999d", "1d 2h", "٣min"):
        with pytest.raises(UserError, match=r"^--x is .*; give a time above 0 and at most 36500d, with its unit"):
            nanoseconds_of(text, "--x")
