"""Explanations add up to the scores of `recommend`, for every kind of model and blend."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmgr_rec import Recommender, UserError
from tests.explanation.explained import recommender
from tests.json_files import edit_json

KINDS: dict[str, dict[str, Any]] = {
    "encoder alone": {},
    "dot product": {"score": "dot"},
    "one baseline": {"item_knn": 4.0},
    "two baselines": {"item_knn": 4.0, "text_knn": 2.0},
    "repeats excluded": {"item_knn": 4.0, "text_knn": 0.5, "repeats": "exclude"},
    "repeats merged": {"item_knn": 1.0, "text_knn": 2.0, "consecutive_repeats": "merge"},
    "newest clicks": {"item_knn": 1.0, "text_knn": 2.0, "max_length": 3},
    "language model": {"stage": "llm", "item_knn": 1.0, "text_knn": 2.0},
    "language model alone": {"stage": "llm only"},
    "text sequence encoder": {"stage": "llm_text", "item_knn": 1.0},
}


def sessions(rec: Recommender) -> list[list[Any]]:
    ids = rec.item_ids.to_pylist()
    return [[ids[3]], [ids[3], ids[5], ids[5], ids[3]], [ids[9], "none", *ids[20:32]]]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_scores_of_recommend(kind: str) -> None:
    rec = recommender(**KINDS[kind])
    for session in sessions(rec):
        (row,) = rec.recommend([session], k=8).to_pylist()
        explanation = rec.explain(session, k=8)
        assert [item.item_id for item in explanation.items] == row["item_ids"]
        assert [item.title for item in explanation.items] == row["titles"]
        for rank, (item, score) in enumerate(zip(explanation.items, row["scores"], strict=True), start=1):
            assert item.rank == rank
            assert item.score == pytest.approx(score, abs=1e-5)
            assert sum(part.value for part in item.parts) == pytest.approx(item.score, abs=1e-9)
            assert sum(part.share for part in item.parts) == pytest.approx(1)
            for part in item.parts:
                if part.clicks:
                    assert sum(click.value for click in part.clicks) == pytest.approx(part.value, abs=1e-9)
        # The same items, asked for by their ids, have the same ranks.
        again = rec.explain(session, items=row["item_ids"][::-1])
        assert [item.rank for item in again.items] == [item.rank for item in explanation.items[::-1]]
        assert [item.parts for item in again.items] == [item.parts for item in explanation.items[::-1]]


@pytest.mark.parametrize("kind", ["two baselines", "repeats merged", "newest clicks", "language model"])
def test_leaving_out_a_click_is_the_difference_to_the_shorter_session(kind: str) -> None:
    rec = recommender(**KINDS[kind])
    session = sessions(rec)[1]
    explanation = rec.explain(session, k=1)
    (item,) = explanation.items
    for number, click in enumerate(item.clicks):
        # Clicks that are merged with this one are left out with it.
        following = [other.position for other in item.clicks[number + 1 :]]
        after = following[0] if kind == "repeats merged" and following else click.position + 1
        shorter = session[: click.position - 1] + session[after - 1 :]
        (row,) = rec.recommend([shorter], k=len(rec.item_ids), exclude_seen=False).to_pylist()
        without = dict(zip(row["item_ids"], row["scores"], strict=True))[item.item_id]
        assert click.leave_one_out == pytest.approx(item.score - without, abs=2e-5)


def test_the_only_click_makes_the_whole_score() -> None:
    rec = recommender(**KINDS["two baselines"])
    (item,) = rec.explain(sessions(rec)[0], k=1).items
    assert [click.leave_one_out for click in item.clicks] == [pytest.approx(item.score)]


def test_neighbors_are_weight_times_recency_times_similarity() -> None:
    rec = recommender(**KINDS["two baselines"])
    session = sessions(rec)[1]
    names = set()
    for item in rec.explain(session, k=20).items:
        for part in item.parts:
            for click in part.clicks:
                names.add(part.name)
                assert part.weight is not None
                assert click.recency == pytest.approx(0.7 ** (len(session) - click.position))
                assert click.value == pytest.approx(part.weight * click.recency * click.similarity)
                assert 0 < click.similarity <= 1 + 1e-6
                shared = {word.word for word in click.words}
                assert bool(shared) == (part.name == "text_knn")
                if shared:
                    assert shared <= set(f"{item.title} {click.title} kind 0 1 2 3".lower().split()) | {"b", "thing"}
                    assert sum(word.share for word in click.words) == pytest.approx(1)
    assert names == {"item_knn", "text_knn"}


def test_says_which_clicks_the_model_has_seen() -> None:
    merged = recommender(**KINDS["repeats merged"])
    a, b, c, d = merged.item_ids.to_pylist()[:4]
    explanation = merged.explain([a, "none", a, b, c])
    assert [click.state for click in explanation.clicks] == ["used", "unknown", "merged", "used", "used"]
    assert explanation.to_dict()["unknown_items"] == ["none"]
    assert explanation.note == "1 of 5 clicks are on items that are not in the catalog."
    newest = recommender(**KINDS["newest clicks"]).explain([a, b, c, d, c])
    assert [click.state for click in newest.clicks] == ["too_old", "too_old", "used", "used", "used"]
    assert [(node.item_id, node.positions) for node in newest.nodes] == [(c, [3, 5]), (d, [4])]
    assert [(edge.source, edge.target, edge.count) for edge in newest.edges] == [(0, 1, 1), (1, 0, 1)]


def test_a_clicked_item_is_excluded_where_repeats_are() -> None:
    rec = recommender(**KINDS["repeats excluded"])
    session = sessions(rec)[1]
    (item,) = rec.explain(session, items=session[:1]).items
    assert (item.rank, item.excluded, item.clicked_before) == (None, True, True)
    assert item.text.startswith("Not recommended, because the session has clicked it before.")
    (item,) = rec.explain(session, items=session[:1], exclude_seen=False).items
    assert not item.excluded
    assert item.rank


def test_the_fallback_is_explained_as_such() -> None:
    rec = recommender(**KINDS["two baselines"])
    for session in ([], ["none"]):
        (row,) = rec.recommend([session], k=4).to_pylist()
        explanation = rec.explain(session, k=4)
        assert explanation.fallback
        assert [item.item_id for item in explanation.items] == row["item_ids"]
        np.testing.assert_allclose([item.score for item in explanation.items], row["scores"], rtol=1e-6)
        assert {item.parts[0].name for item in explanation.items} == {"popularity"}
        assert "most popular" in explanation.to_text()


def test_a_bundle_of_an_earlier_version_keeps_its_baselines_together(tmp_path: Path) -> None:
    rec = recommender(**KINDS["two baselines"])
    rec.save(tmp_path / "old")
    for term in (tmp_path / "old").glob("blend-*.npz"):
        term.unlink()
    edit_json(tmp_path / "old" / "bundle.json", lambda index: [index["files"].pop(f"blend-{n}.npz") for n in (0, 1)])
    session = sessions(rec)[1]
    (item,), (apart,) = Recommender.load(tmp_path / "old").explain(session, k=1).items, rec.explain(session, k=1).items
    values = {part.name: part.value for part in item.parts}
    assert set(values) == {"encoder", "item_knn+text_knn"}
    assert item.score == pytest.approx(apart.score)
    assert "neighbors by item_knn+text_knn" in item.text


def test_a_damaged_part_of_a_blend_is_refused(tmp_path: Path) -> None:
    rec = recommender(**KINDS["two baselines"])
    rec.save(tmp_path / "model")
    file = tmp_path / "model" / "blend-1.npz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = Recommender.load(tmp_path / "model")
    assert damaged.recommend(sessions(rec)).num_rows == 3
    with pytest.raises(UserError, match=r"blend-1\.npz is damaged"):
        damaged.explain(sessions(rec)[1])


def test_smoothing_has_the_share_of_the_neighbors() -> None:
    rec = recommender(smoothing=20.0)
    items = rec.explain(sessions(rec)[1], k=5).items
    assert all(item.smoothing is not None for item in items)
    for item in items:
        assert item.smoothing is not None
        assert item.smoothing.share == pytest.approx(20 / (item.training_clicks + 20))
    assert any("items with similar words make up" in item.text for item in items)


def test_a_language_model_encodes_few_shorter_sessions() -> None:
    rec = recommender(**KINDS["language model"])
    session = sessions(rec)[2]
    explanation = rec.explain(session, k=1)
    known = [click.leave_one_out is not None for click in explanation.items[0].clicks]
    assert known == [False] * (len(known) - 10) + [True] * 10
    assert "Only the newest 10 clicks" in explanation.to_text()


def test_nearest_items_are_those_of_similar() -> None:
    rec = recommender(**KINDS["two baselines"])
    (item,) = rec.explain(sessions(rec)[0], k=1).items
    (row,) = rec.similar([item.item_id], k=5).to_pylist()
    assert [near.item_id for near in item.nearest] == row["item_ids"]


def test_the_json_is_what_the_records_hold() -> None:
    rec = recommender(**KINDS["two baselines"])
    explanation = rec.explain(sessions(rec)[2], k=2)
    content = json.loads(explanation.to_json())
    assert content == explanation.to_dict()
    assert content["items"][0]["parts"][0]["share"] == explanation.items[0].parts[0].share


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0; an explanation has 1 to 100 items"),
        ({"items": []}, "number of items is 0"),
        ({"items": ["no such"]}, "item 'no such' is not in the catalog"),
        ({"session": "i3"}, r"session is 'i3'; give a list of item ids: \['i3'\]"),
        ({"session": [["i3"]]}, "session holds lists; give one list of item ids"),
        ({"session": ["i3", None]}, "the session holds 1 null item ids"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], message: str) -> None:
    rec = recommender()
    with pytest.raises(UserError, match=message) as raised:
        rec.explain(**{"session": sessions(rec)[0], **options})
    assert "\n" not in str(raised.value)
