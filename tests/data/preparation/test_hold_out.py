"""Held-out items: never in training, everything else as it was, and nothing lost without being counted."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmgr_rec.data.preparation import duckdb_database
from llmgr_rec.errors import UserError
from llmgr_rec.prepare import main
from tests.data.prepare_inputs import Click, Prepared, Row, prepare, write_interactions, write_items

FEW = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
CLICKS = st.lists(
    st.tuples(
        st.sampled_from(["train_a", "train_b", "train_c", "valid_d", "test_e", "test_f"]),
        st.sampled_from([f"i{n}" for n in range(9)]),
        st.integers(0, 12),
    ),
    min_size=4,
    max_size=80,
)
SPLITS: list[dict[str, Any]] = [
    {"split": "leave_one_out"},
    {"split": "temporal", "valid_share": 0.2, "test_share": 0.3},
    {"split": "predefined"},
]


def held_out(ids: list[Any], share: float, seed: int) -> set[Any]:
    """The documented choice, from the ids alone."""
    digests = {item_id: hashlib.md5(f"{seed}:{item_id}".encode()).digest() for item_id in ids}
    return {item_id for item_id, digest in digests.items() if int.from_bytes(digest[8:], "little") < share * 2**64}


def without(rows: list[Row], items: set[Any]) -> list[Row]:
    """Rows less some items; of fewer than two clicks no row is left."""
    left = ((user, [item for item in (*history, target) if item not in items]) for user, history, target in rows)
    return [(user, tuple(clicks[:-1]), clicks[-1]) for user, clicks in left if len(clicks) > 1]


def clicks_of(rows: list[Row]) -> Counter[Any]:
    return Counter(item for _, history, target in rows for item in (*history, target))


def prepare_or_none(folder: Path, clicks: list[Click], options: dict[str, Any]) -> Prepared | None:
    folder.mkdir()
    try:
        return prepare(folder, clicks, **options)
    except UserError:
        assert not (folder / "dataset").exists()
        return None


@FEW
@given(clicks=CLICKS, split=st.sampled_from(SPLITS), share=st.sampled_from([0.2, 0.5]), seed=st.integers(0, 9))
def test_no_held_out_item_is_in_training_and_all_rows_are_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[Click], split: dict[str, Any], share: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    plain = prepare_or_none(folder / "plain", clicks, split)
    cut = prepare_or_none(folder / "cut", clicks, split | {"hold_out_items": share, "hold_out_seed": seed})
    if plain is None:
        assert cut is None
        return
    unseen = held_out(plain.ids, share, seed)
    expected = without(plain.rows["train"], unseen)
    if not unseen or not expected:
        assert cut is None
        return
    assert cut is not None
    assert not unseen & set(clicks_of(cut.rows["train"]))
    assert cut.rows["train"] == expected
    assert (cut.ids, cut.rows["valid"], cut.rows["test"]) == (plain.ids, plain.rows["valid"], plain.rows["test"])
    counts = clicks_of(cut.rows["train"])
    assert [item["train_count"] for item in cut.items] == [counts[item_id] for item_id in cut.ids]
    assert [item["held_out"] for item in cut.items] == [item_id in unseen for item_id in cut.ids]
    assert "held_out" not in plain.items[0]
    before = clicks_of(plain.rows["train"])
    assert cut.dataset.manifest.held_out == {
        "share": share,
        "seed": seed,
        "items": len(unseen),
        "clicks": sum(before[item] for item in unseen),
        "sessions": len(plain.rows["train"]) - len(expected),
    }
    assert plain.dataset.manifest.held_out == {}


def long_log() -> list[Click]:
    rng = np.random.default_rng(0)
    return [(f"u{user}", f"i{rng.integers(40)}", 100 * user + n) for user in range(80) for n in range(9)]


def test_the_choice_depends_on_seed_and_id_alone(tmp_path: Path) -> None:
    clicks = long_log()
    first = prepare(tmp_path, clicks, hold_out_items=0.2, output=str(tmp_path / "a"))
    turned = [clicks[n] for n in np.random.default_rng(1).permutation(len(clicks))]
    items = str(write_items(tmp_path / "turned.parquet", ["more", *first.ids[::-1], "still more"]))
    more = {"hold_out_items": 0.2, "items": items, "keep_unseen_items": True}
    second = prepare(tmp_path, turned, output=str(tmp_path / "b"), **more)
    chosen = {item["item_id"] for item in first.items if not item["train_count"]}
    assert chosen == held_out(first.ids, 0.2, 0)
    assert {item["item_id"] for item in second.items if not item["train_count"]} - {"more", "still more"} == chosen
    assert sorted(first.rows["train"]) == sorted(second.rows["train"])
    other = prepare(tmp_path, clicks, hold_out_items=0.2, hold_out_seed=1, output=str(tmp_path / "c"))
    assert {item["item_id"] for item in other.items if not item["train_count"]} != chosen
    larger = prepare(tmp_path, clicks, hold_out_items=0.4, output=str(tmp_path / "d"))
    assert chosen < {item["item_id"] for item in larger.items if not item["train_count"]}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(tmp_path, long_log(), hold_out_items=0.3, output=str(tmp_path / "a"), threads=1).dataset.path
    monkeypatch.setattr(duckdb_database, "BATCH_ROWS", 2048)  # the smallest that DuckDB hands out
    second = prepare(tmp_path, long_log(), hold_out_items=0.3, output=str(tmp_path / "b"), threads=4).dataset.path
    for path in (path for path in first.rglob("*") if path.is_file()):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path


def test_integer_ids_are_chosen_as_their_digits_are(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.parquet", list(range(40)))
    sessions = [[int(n) for n in np.random.default_rng(user).integers(40, size=9)] for user in range(80)]
    pq.write_table(pa.table({"session_id": range(80), "items": sessions}), tmp_path / "sessions.parquet")
    result = prepare(tmp_path, sessions=str(tmp_path / "sessions.parquet"), items=str(items), hold_out_items=0.2)
    assert {item["item_id"] for item in result.items if not item["train_count"]} == held_out([*range(40)], 0.2, 0)


def test_long_sessions_are_cut_after_the_items_have_left(tmp_path: Path) -> None:
    ids = [f"i{n}" for n in range(30)]
    unseen = held_out(ids, 0.3, 0)
    clicks = [("u", item, n) for n, item in enumerate(ids)]
    left = [item for item in ids[:-2] if item not in unseen]
    options: dict[str, Any] = {"hold_out_items": 0.3, "max_length": 4}
    newest = prepare(tmp_path, clicks, long_sessions="newest", output=str(tmp_path / "newest"), **options)
    assert newest.rows["train"] == [("u", tuple(left[-5:-1]), left[-1])]
    assert newest.rows["test"] == [("u", tuple(ids[-5:-1]), ids[-1])]
    every = prepare(tmp_path, clicks, long_sessions="split", output=str(tmp_path / "split"), **options)
    assert every.dataset.manifest.num_examples["train"] == len(left) - 1
    assert {item["item_id"]: item["train_count"] for item in every.items} == {item: item in left for item in ids}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hold_out_items", "1"], "--hold_out_items is 1.0; give a number below 1"),
        (["--hold_out_items", "-0.1"], "--hold_out_items is -0.1"),
        (["--hold_out_items", "0.001"], "holds out none of 40 items; give a larger share or another --hold_out_seed"),
        (["--hold_out_items", "0.999"], "gives no train rows.*lower --hold_out_items"),
    ],
)
def test_a_share_that_cannot_work_is_refused(tmp_path: Path, words: list[str], message: str) -> None:
    interactions = write_interactions(tmp_path / "interactions.parquet", long_log())
    items = write_items(tmp_path / "items.parquet", sorted({item for _, item, _ in long_log()}))
    paths = ["--interactions", str(interactions), "--items", str(items), "--output", str(tmp_path / "dataset")]
    with pytest.raises(UserError, match=message):
        main([*paths, *words])
    assert not (tmp_path / "dataset").exists()


def test_the_summary_line_says_what_was_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interactions = write_interactions(tmp_path / "interactions.parquet", long_log())
    ids = sorted({item for _, item, _ in long_log()})
    items = write_items(tmp_path / "items.parquet", ids)
    paths = ["--interactions", str(interactions), "--items", str(items), "--output", str(tmp_path / "dataset")]
    main([*paths, "--hold_out_items", "0.2"])
    printed = capsys.readouterr().out.splitlines()[-1]
    assert f"{len(held_out(ids, 0.2, 0))} items held out of training (" in printed
