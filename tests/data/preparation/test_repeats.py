"""Whether training sessions repeat a click: the data set records it when it is written."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmgr_rec.data.preparation import database
from llmgr_rec.errors import UserError
from tests.data.prepare_inputs import Click, Row, prepare

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
    {"split": "leave_one_out", "prefix_augmentation": "train"},
    {"split": "leave_one_out", "hold_out_items": 0.3},
    {"split": "temporal", "valid_share": 0.2, "test_share": 0.3},
    {"split": "temporal", "valid_share": 0.2, "test_share": 0.3, "hold_out_items": 0.3},
    {"split": "predefined"},
]


def repeat(rows: list[Row]) -> bool:
    """Whether a row holds an item twice, its target included."""
    return any(len({*items, target}) <= len(items) for _, items, target in rows)


def distinct(users: int = 12, clicks: int = 9) -> list[Click]:
    """A log of users who never click an item twice, all of them with some items in common."""
    return [(f"u{user}", f"i{(user + 3 * n) % 40}", n) for user in range(users) for n in range(clicks)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(clicks=CLICKS, split=st.sampled_from(SPLITS))
def test_the_manifest_says_what_the_training_rows_show(
    tmp_path_factory: pytest.TempPathFactory, clicks: list[Click], split: dict[str, Any]
) -> None:
    try:
        result = prepare(tmp_path_factory.mktemp("prepare"), clicks, **split)
    except UserError:
        return
    assert result.dataset.manifest.clicks_repeat == repeat(result.rows["train"])


@pytest.mark.parametrize("options", [*SPLITS[:3], {"prefix_augmentation": "train", "long_sessions": "split"}])
def test_one_repeat_in_one_training_session_is_enough(tmp_path: Path, options: dict[str, Any]) -> None:
    plain = prepare(tmp_path, distinct(), output=str(tmp_path / "plain"), **options)
    assert not plain.dataset.manifest.clicks_repeat
    # In the middle of training; its item is not held out.
    kept = next(item["item_id"] for item in plain.items if item["train_count"])
    more = [("v", item, n) for n, item in enumerate([kept, "i99", kept, "i98", "i97"])]
    assert prepare(tmp_path, distinct() + more, output=str(tmp_path / "more"), **options).dataset.manifest.clicks_repeat


def test_the_target_counts_and_later_clicks_do_not(tmp_path: Path) -> None:
    def flag(name: str, items: list[str]) -> bool:
        clicks = distinct() + [("v", item, n) for n, item in enumerate(items)]
        return prepare(tmp_path, clicks, output=str(tmp_path / name)).dataset.manifest.clicks_repeat

    assert flag("target", ["a", "b", "a", "c", "d"])
    assert not flag("valid", ["a", "b", "c", "a", "d"])
    assert not flag("test", ["a", "b", "c", "d", "a"])
    # Items that another user has clicked are no repeats.
    assert not flag("others", ["i0", "i3", "i6", "i9", "i12"])


def test_repeats_count_however_far_apart_and_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The row keeps the newest four clicks, and the repeat is older.
    early = [("v", item, n) for n, item in enumerate(["a", "a", *(f"i{n}" for n in range(12))])]
    assert prepare(tmp_path, distinct() + early, max_length=4).dataset.manifest.clicks_repeat
    monkeypatch.setattr(database, "_BATCH_ROWS", 2048)  # the smallest that DuckDB hands out
    many = prepare(tmp_path, distinct(700), output=str(tmp_path / "many"))
    assert not many.dataset.manifest.clicks_repeat
    more = [(f"w{user}", item, n) for user in range(3) for n, item in enumerate(["a", "b", "b", "c", "d"])]
    assert prepare(tmp_path, distinct(700) + more, output=str(tmp_path / "more")).dataset.manifest.clicks_repeat


def test_a_repeat_of_a_held_out_item_is_none_in_training(tmp_path: Path) -> None:
    more = [(user, item, n) for user in "vw" for n, item in enumerate(["i90", "x", "i90", "y", "z", "i91", "i92"])]
    plain = prepare(tmp_path, distinct() + more, output=str(tmp_path / "plain"))
    cut = prepare(tmp_path, distinct() + more, hold_out_items=0.9, output=str(tmp_path / "cut"))
    assert plain.dataset.manifest.clicks_repeat
    assert not {item["train_count"] for item in cut.items if item["item_id"] == "i90"} - {0}
    assert not cut.dataset.manifest.clicks_repeat
