"""prepare against a naive reference, and the contract of what it writes."""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmgr_rec.data.preparation import parts
from llmgr_rec.data.preparation.items import category_paths
from llmgr_rec.data.preparation.summary import summary_lines
from llmgr_rec.data.preparation.windows import make_windows, phase_ends
from llmgr_rec.data.schema import SPLITS
from llmgr_rec.errors import UserError
from llmgr_rec.prepare import main
from tests.data.prepare_inputs import Click, Row, prepare, read, write_interactions, write_items

FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
CLICKS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from([f"i{n}" for n in range(9)]), st.integers(0, 12)),
    min_size=1,
    max_size=80,
)
# Two users of five clicks with ties, plus one that is too short for a test row.
SMALL: list[Click] = [("u", f"i{n}", n // 2) for n in range(5)] + [("v", f"i{n}", 9 - n) for n in range(5)]
SMALL += [("w", "i0", 3)]


def naive_core(clicks: list[Click], k: int) -> dict[str, list[tuple[str, int]]]:
    """Users in order of their first row with (item, time) in order, after the k-core; plain loops."""
    order = list(dict.fromkeys(user for user, _, _ in clicks))
    while True:
        users, items = Counter(c[0] for c in clicks), Counter(c[1] for c in clicks)
        kept = [c for c in clicks if users[c[0]] >= k and items[c[1]] >= k]
        if len(kept) == len(clicks):
            break
        clicks = kept
    sequences = defaultdict(list)
    for user, item, time in clicks:
        sequences[user].append((item, time))
    # sorted() is stable: a tie in time keeps the order of the rows.
    return {user: sorted(sequences[user], key=lambda click: click[1]) for user in order if user in sequences}


def naive_row(user: str, items: list[str], max_length: int) -> Row:
    return user, tuple(items[:-1][-max_length:]), items[-1]


def naive_leave_one_out(
    sequences: dict[str, list[tuple[str, int]]], max_length: int, long_sessions: str
) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for user, clicks in sequences.items():
        items = [item for item, _ in clicks]
        for split, cut in (("train", len(items) - 2), ("valid", len(items) - 1), ("test", len(items))):
            while cut >= 2:
                rows[split].append(naive_row(user, items[:cut], max_length))
                # Further training rows end where the history of the one before began.
                cut = cut - max_length if split == "train" and long_sessions == "split" else 0
    return rows


def naive_temporal(
    sequences: dict[str, list[tuple[str, int]]], cuts: dict[str, int], max_length: int
) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    bounds = {"train": (-1, cuts["train"]), "valid": (cuts["train"], cuts["valid"]), "test": (cuts["valid"], 10**9)}
    for user, clicks in sequences.items():
        for split, (after, end) in bounds.items():
            until = [click for click in clicks if click[1] <= end]
            if len(until) >= 2 and until[-1][1] > after:
                rows[split].append(naive_row(user, [item for item, _ in until], max_length))
    return rows


@FEW
@given(
    clicks=CLICKS, k=st.integers(0, 3), max_length=st.integers(1, 4), long_sessions=st.sampled_from(["newest", "split"])
)
def test_leave_one_out_equals_the_naive_split(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[Click], k: int, max_length: int, long_sessions: str
) -> None:
    # Of equal clicks, the first counts.
    sequences = naive_core(list(dict.fromkeys(clicks)), k)
    expected = naive_leave_one_out(sequences, max_length, long_sessions)
    options: dict[str, Any] = {"min_interactions": k, "max_length": max_length, "long_sessions": long_sessions}
    folder = tmp_path_factory.mktemp("prepare")
    if not all(expected.values()):
        with pytest.raises(UserError):
            prepare(folder, clicks, **options)
        assert not (folder / "dataset").exists()
        return
    result = prepare(folder, clicks, **options)
    assert sorted(result.rows["train"]) == sorted(expected["train"])
    assert result.rows["valid"] == expected["valid"]
    assert result.rows["test"] == expected["test"]
    assert result.ids == sorted({item for clicks in sequences.values() for item, _ in clicks})
    # No leak: a user's training row ends two clicks before its test target, one before its validation target.
    # Of several training rows of a user, the first ends last.
    train, valid = ({row[0]: row for row in reversed(result.rows[split])} for split in ("train", "valid"))
    for user, history, _ in result.rows["test"]:
        if user in valid:
            assert history[-1] == valid[user][2]
        if user in train:
            assert valid[user][1][-1] == train[user][2]


@FEW
@given(
    clicks=CLICKS, k=st.integers(0, 2), shares=st.tuples(st.sampled_from([0.0, 0.2, 0.4]), st.sampled_from([0.2, 0.5]))
)
def test_temporal_split_equals_the_naive_split_and_never_trains_after_the_cut(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[Click], k: int, shares: tuple[float, float]
) -> None:
    # Of equal clicks, the first counts.
    sequences = naive_core(list(dict.fromkeys(clicks)), k)
    folder = tmp_path_factory.mktemp("prepare")
    options = {"split": "temporal", "valid_share": shares[0], "test_share": shares[1], "min_interactions": k}
    try:
        result = prepare(folder, clicks, **options)
    except UserError:
        assert not (folder / "dataset").exists()
        return
    cuts = result.dataset.manifest.cuts
    expected = naive_temporal(sequences, cuts, 50)
    assert sorted(result.rows["train"]) == sorted(expected["train"])
    assert result.rows["valid"] == expected["valid"]
    assert result.rows["test"] == expected["test"]
    after = [user for user, clicks in sequences.items() if clicks[-1][1] > cuts["valid"]]
    assert 0 < len(after) <= shares[1] * len(sequences) + 1


def test_temporal_split_of_many_users_has_the_shares_asked_for(tmp_path: Path) -> None:
    clicks = [(f"u{u}", f"i{(u + n) % 7}", 100 * n + u) for u in range(200) for n in range(4)]
    result = prepare(tmp_path, clicks, split="temporal", valid_share=0.2, test_share=0.1)
    assert len(result.rows["test"]) == 20
    assert len(result.rows["valid"]) == 40
    assert len(result.rows["train"]) == 200


@FEW
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    max_length=st.integers(1, 4),
    augmented_phase=st.integers(0, 2),
)
def test_split_long_sessions_predict_every_click_once(
    lengths: list[int], max_length: int, augmented_phase: int
) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    phases = np.full(offsets[-1], augmented_phase)
    windows = make_windows(offsets, phase_ends(offsets, phases), augmented_phase, max_length, split_long=True)
    targets: list[int] = []
    for start, stop in zip(windows.start_R, windows.stop_R, strict=True):
        assert 1 <= stop - start <= max_length
        targets += range(start + 1, stop + 1)
    assert sorted(targets) == sorted(set(range(offsets[-1])) - set(offsets[:-1]))


def test_training_counts_count_each_click_of_the_rows_once(tmp_path: Path) -> None:
    clicks = [("u", f"i{n % 3}", n) for n in range(12)] + [("v", "i3", n) for n in range(4)]
    cut = prepare(tmp_path, clicks, max_length=4, long_sessions="newest")
    in_rows = Counter(item for _, items, target in cut.rows["train"] for item in (*items, target))
    assert {item["item_id"]: item["train_count"] for item in cut.items} == {id_: in_rows[id_] for id_ in cut.ids}
    whole = prepare(tmp_path, clicks, max_length=4, long_sessions="split", output=str(tmp_path / "split"))
    assert [item["train_count"] for item in whole.items] == [4, 3, 3, 2]
    assert whole.dataset.manifest.num_examples["train"] == 9 + 1


def test_contract_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(parts, "PART_ROWS", 8)
    clicks = [(f"u{u}", f"i{(u * n) % 11}", n) for u in range(21) for n in range(6)]
    result = prepare(tmp_path, clicks, prefix_augmentation="train")
    manifest = result.dataset.manifest
    assert [part.name for part in result.dataset.parts("train")] == [f"part-{n:05d}.parquet" for n in range(3)]
    examples = 0
    for split in SPLITS:
        for part in result.dataset.parts(split):
            file = pq.ParquetFile(part)
            assert file.schema_arrow.metadata[b"llmgr_rec.items"] == b"index"
            assert file.schema_arrow.metadata[b"llmgr_rec.catalogue_hash"] == manifest.catalog_hash.encode()
            assert file.schema_arrow.types == [pa.string(), pa.list_(pa.int64()), pa.int64()]
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            assert all(group.num_rows <= 4 for group in groups)
            examples += sum(group.column(1).num_values for group in groups) if split == "train" else 0
    assert manifest.num_sessions == {"train": 21, "valid": 21, "test": 21}
    assert manifest.num_examples == {"train": examples, "valid": 21, "test": 21}
    for name, entry in manifest.files.items():
        content = (result.dataset.path / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    ids = b"".join(item_id.encode() + b"\0" for item_id in result.ids)
    assert manifest.catalog_hash == hashlib.sha256(ids).hexdigest()
    # Shuffled for training, as given for the rest.
    assert [row[0] for row in result.rows["test"]] == [f"u{n}" for n in range(21)]
    assert [row[0] for row in result.rows["train"]] != [f"u{n}" for n in range(21)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "interactions.parquet", "items.parquet"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    clicks = [(f"u{u}", f"i{(u * n) % 23}", (u * n) % 5) for u in range(300) for n in range(9)]
    first = prepare(tmp_path, clicks, output=str(tmp_path / "a"), threads=1).dataset.path
    second = prepare(tmp_path, clicks, output=str(tmp_path / "b"), threads=4, memory_gb=0.3).dataset.path
    names = [path.relative_to(first) for path in sorted(first.rglob("*")) if path.is_file()]
    assert names == [path.relative_to(second) for path in sorted(second.rglob("*")) if path.is_file()]
    assert len(names) == 5
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_items_keep_text_and_get_feature_ids(tmp_path: Path) -> None:
    items = write_items(
        tmp_path / "items.parquet",
        [f"i{n}" for n in range(5)] + ["never"],
        title=["one", None, "three", "four", "five", "six"],
        category=["Beauty > Hair", "Beauty > Bath, Body | Gifts", None, "Drama, Sci-Fi", "", "Unseen"],
        brand=["A", "B", "A", None, " ", "C"],
    )
    result = prepare(tmp_path, SMALL, items=str(items))
    assert result.ids == [f"i{n}" for n in range(5)]
    assert [item["index"] for item in result.items] == list(range(5))
    assert [item["title"] for item in result.items] == ["one", None, "three", "four", "five"]
    assert [item["category_ids"] for item in result.items] == [[0, 1], [0, 2, 3], [], [4, 5], []]
    assert [item["brand_ids"] for item in result.items] == [[0], [1], [0], [], []]
    assert result.items[0]["description"] is None
    manifest = result.dataset.manifest
    assert manifest.features == {"category": {"num_embeddings": 6}, "brand": {"num_embeddings": 2}}
    assert [item["word_ids"] for item in result.items] == [[]] * 5, "each word in one title"
    assert manifest.has_text
    unseen = prepare(tmp_path, SMALL, items=str(items), keep_unseen_items=True, output=str(tmp_path / "unseen"))
    assert unseen.ids[-1] == "never"
    assert unseen.items[-1]["train_count"] == 0


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        (None, []),
        ("Beauty", ["Beauty"]),
        ("A > B > C", ["A", "A > B", "A > B > C"]),
        ("A > B | A > C", ["A", "A > B", "A > C"]),
        ("A > B, C", ["A", "A > B, C"]),
        ("Drama, Sci-Fi,Drama", ["Drama", "Sci-Fi"]),
        (" > ", []),
    ],
)
def test_category_paths(text: str | None, paths: list[str]) -> None:
    assert category_paths(text) == paths


def test_a_catalog_without_text_has_none(tmp_path: Path) -> None:
    ids = [f"i{n}" for n in range(5)]
    items = write_items(tmp_path / "items.parquet", ids, title=pa.nulls(5, pa.string()))
    manifest = prepare(tmp_path, SMALL, items=str(items)).dataset.manifest
    assert not manifest.has_text
    assert manifest.features == {}


@pytest.mark.parametrize("policy", ["drop", "keep"])
def test_items_missing_from_the_catalog_are_dropped_or_kept(tmp_path: Path, policy: str) -> None:
    items = write_items(tmp_path / "items.parquet", ["i4", "i1", "i0", "i2"])
    result = prepare(tmp_path, SMALL, items=str(items), missing_items=policy)
    assert result.ids == ["i4", "i1", "i0", "i2"] + (["i3"] if policy == "keep" else [])
    assert result.dataset.manifest.num_clicks["kept"] == (11 if policy == "keep" else 9)
    if policy == "keep":
        assert result.items[-1]["title"] is None


@pytest.mark.parametrize("ids", ["text", "numbers"])
def test_without_an_item_file_the_items_are_those_of_the_clicks(tmp_path: Path, ids: str) -> None:
    known = [7, 5, 9, 4] if ids == "numbers" else ["i7", "i5", "i9", "i4"]
    clicks = pa.table({"user_id": [1] * 4 + [2] * 4, "item_id": [*known, *known], "timestamp": range(8)})
    pq.write_table(clicks, tmp_path / "interactions.parquet")
    with_file = prepare(
        tmp_path,
        interactions=str(tmp_path / "interactions.parquet"),
        items=str(write_items(tmp_path / "items.parquet", known, title=[None] * 4)),
        output=str(tmp_path / "with"),
    )
    without = prepare(tmp_path, interactions=str(tmp_path / "interactions.parquet"))
    assert without.rows == with_file.rows
    assert without.items == with_file.items
    assert without.ids == known
    assert without.dataset.manifest.catalog_hash == with_file.dataset.manifest.catalog_hash
    lists = pa.table({"session_id": [1, 2], "items": [known, known]})
    pq.write_table(lists, tmp_path / "sessions.parquet")
    of_lists = prepare(tmp_path, sessions=str(tmp_path / "sessions.parquet"), output=str(tmp_path / "lists"))
    assert sorted(of_lists.ids) == sorted(known)


def test_items_without_the_column_title_have_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(5)]}), tmp_path / "items.parquet")
    prepared = prepare(tmp_path, SMALL, items=str(tmp_path / "items.parquet"))
    assert {item["title"] for item in prepared.items} == {None}
    assert "items.parquet: there is no column title, so the items have none" in caplog.text


def test_words_of_several_titles_and_not_of_many_get_ids(tmp_path: Path) -> None:
    titles = [f"The Thing no. {n}" for n in range(30)]
    titles[3], titles[7], titles[8], titles[9] = "Soap, soap & OIL", "oil for Lamps", None, "a Lamps' wick"
    clicks: list[Click] = [("u", f"i{n:02}", n) for n in range(30)]
    items = write_items(tmp_path / "items.parquet", [item for _, item, _ in clicks], title=titles)
    result = prepare(tmp_path, clicks, items=str(items))
    words = {item["title"]: item["word_ids"] for item in result.items}
    assert words["Soap, soap & OIL"] == [0], "soap is of one title alone"
    assert words["oil for Lamps"] == [0, 1]
    assert words["a Lamps' wick"] == [1]
    assert words[None] == words["The Thing no. 5"] == []
    assert result.dataset.manifest.features == {"word": {"num_embeddings": 2}}


def write_sessions(path: Path, sessions: list[list[str]], **more: list[Any]) -> str:
    columns = {"session_id": [f"s{n}" for n in range(len(sessions))], "items": sessions}
    pq.write_table(pa.table(columns | more), path)
    return str(path)


def test_sessions_as_lists(tmp_path: Path) -> None:
    items = str(write_items(tmp_path / "items.parquet", list("abc")))
    sessions = [list("abca"), list("ba"), [], list("ca"), list("bbb"), ["a"]]
    words = ["train", "train", "train", "validation", "Test", "test"]
    path = write_sessions(tmp_path / "sessions.parquet", sessions, split=words)
    result = prepare(tmp_path, sessions=path, items=items, split="predefined", prefix_augmentation="all")
    assert sorted(result.rows["train"]) == [("s0", ("a", "b", "c"), "a"), ("s1", ("b",), "a")]
    assert result.rows["valid"] == [("s3", ("c",), "a")]
    assert result.rows["test"] == [("s4", ("b", "b"), "b")]
    assert result.dataset.manifest.num_examples == {"train": 4, "valid": 1, "test": 2}


def test_temporal_split_of_sessions_keeps_each_whole(tmp_path: Path) -> None:
    items = str(write_items(tmp_path / "items.parquet", list("abc")))
    times = list(range(10))[::-1]
    path = write_sessions(tmp_path / "s.parquet", [list("abc")] * 10, timestamp=times)
    result = prepare(tmp_path, sessions=path, items=items, split="temporal", prefix_augmentation="all", test_share=0.2)
    assert [row[0] for row in result.rows["test"]] == ["s0", "s1"]
    assert [row[0] for row in result.rows["valid"]] == ["s2"]
    assert len(result.rows["train"]) == 7
    assert result.dataset.manifest.num_examples == {"train": 14, "valid": 2, "test": 4}


def test_predefined_split_by_name_takes_validation_from_the_newest_sessions(tmp_path: Path) -> None:
    clicks = [(f"train_{u}", item, 10 * u + n) for u in range(10) for n, item in enumerate("abc")]
    clicks += [("test_1", item, 200) for item in "abc"]
    result = prepare(tmp_path, clicks, split="predefined", valid_share=0.2)
    assert [row[0] for row in result.rows["valid"]] == ["train_8", "train_9"]
    assert len(result.rows["train"]) == 8
    assert [row[0] for row in result.rows["test"]] == ["test_1"]
    none = prepare(tmp_path, clicks, split="predefined", valid_share=0, output=str(tmp_path / "none"))
    assert none.dataset.manifest.num_sessions == {"train": 10, "valid": 0, "test": 1}
    assert pq.read_table(none.dataset.parts("valid")[0]).num_rows == 0


def test_predefined_split_of_single_clicks_gives_history_from_earlier_splits(tmp_path: Path) -> None:
    words = ["train"] * 3 + ["valid"] + ["test"] * 2
    clicks = [("u", item, n) for n, item in enumerate("abcdef")]
    path = write_interactions(tmp_path / "i.parquet", clicks, part=words)
    items = write_items(tmp_path / "items.parquet", list("abcdef"))
    options: dict[str, Any] = {
        "interactions": str(path),
        "items": str(items),
        "split": "predefined",
        "split_column": "part",
    }
    result = prepare(tmp_path, **options)
    assert result.rows == {
        "train": [("u", ("a", "b"), "c")],
        "valid": [("u", ("a", "b", "c"), "d")],
        "test": [("u", ("a", "b", "c", "d", "e"), "f")],
    }


def test_command_line_prints_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interactions = write_interactions(tmp_path / "interactions.parquet", SMALL)
    items = write_items(tmp_path / "items.parquet", [f"i{n}" for n in range(5)] + ["x"])
    words = ["--interactions", str(interactions), "--items", str(items), "--output", str(tmp_path / "new" / "set")]
    main([*words, "--min_interactions", "1", "--keep_unseen_items"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 4
    assert "\n1 items of the item file have no click: kept\n" in f"\n{printed}"
    assert "of 11 clicks, 8 are targets (train 4, valid 2, test 2), 2 only inputs, 1 neither; 1 the only" in printed
    assert "targets train 0.0%, valid 0.0%, test 0.0%; excluded from rankings (less than 5% of the targets" in printed
    assert "11 of 11 clicks kept, 6 items, train 2 rows, valid 2 rows, test 2 rows" in printed
    manifest = json.loads((tmp_path / "new" / "set" / "manifest.json").read_text())
    assert manifest["num_items"] == 6
    assert manifest["prefix_augmentation"] == ["train"]
    assert read(tmp_path / "new" / "set").rows["test"][0] == ("u", ("i0", "i1", "i2", "i3"), "i4")


def test_the_summary_counts_what_the_filters_leave_out(tmp_path: Path) -> None:
    clicks = [("a", f"i{n}", n) for n in range(4)] * 2 + [("b", f"i{n}", 9 + n) for n in range(4)] + [("c", "i9", 1)]
    clicks += [("a", "gone", 20)]
    items = write_items(tmp_path / "items.parquet", [f"i{n}" for n in range(10)])
    found = prepare(tmp_path, clicks, items=str(items), min_interactions=2, missing_items="drop").dataset.manifest
    lines = summary_lines(found)
    assert "1 clicks on items that the item file lacks: dropped (--missing_items)" in lines
    assert (
        "sessions and items with too few clicks: 1 of 3 sessions and 1 of 5 items dropped, with 1 clicks "
        "(--min_interactions, --min_session_length)"
    ) in lines
    assert "5 items of the item file have no click: left out (--keep_unseen_items keeps them)" in lines
    assert found.filtered == {
        "before": {"clicks": 9, "sessions": 3, "items": 5},
        "after": {"clicks": 8, "sessions": 2, "items": 4},
        "item_file": {"items": 10},
    }


def test_an_empty_output_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    assert prepare(tmp_path, SMALL).dataset.manifest.num_items == 5
