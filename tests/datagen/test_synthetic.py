"""The synthetic data really hold the rules their documentation promises."""

import resource
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from datagen import planted
from datagen.synthetic import generate, main, oracle_hit_rate
from llmgr_rec.errors import UserError


def _titles_and_steps(folder: Path) -> tuple[list[list[str]], np.ndarray, np.ndarray]:
    """Title words of every item; item numbers before and after each step inside a session."""
    items = pq.read_table(folder / "items.parquet").to_pydict()
    number = {name: i for i, name in enumerate(items["item_id"])}
    rows = pq.read_table(folder / "interactions.parquet").to_pydict()
    clicks = np.array([number[name] for name in rows["item_id"]])
    users = np.array(rows["user_id"])
    inside = users[1:] == users[:-1]
    return [title.split() for title in items["title"]], clicks[:-1][inside], clicks[1:][inside]


def _share_told_by_titles(folder: Path) -> float:
    words, before, after = _titles_and_steps(folder)
    return float(np.mean([words[i][-1] == words[j][0] for i, j in zip(before, after, strict=True)]))


@pytest.mark.parametrize("text_share", [0.0, 0.3, 0.8])
def test_text_share_of_the_steps_follows_the_titles(tmp_path: Path, text_share: float) -> None:
    generate(tmp_path / "d", text_share=text_share, items=640, seed=3)
    # By chance the table obeys the titles once in 40 themes. Three standard errors of 16,000 steps are 0.012.
    expected = text_share + (1 - text_share) / 40
    assert _share_told_by_titles(tmp_path / "d") == pytest.approx(expected, abs=0.012)


def test_the_other_steps_go_to_four_successors_in_the_planted_shares(tmp_path: Path) -> None:
    generate(tmp_path / "d", text_share=0.5, items=320, sessions=4000)
    world = planted.plant(320, 9.0, 0.5, 0.3, 0)
    _, before, after = _titles_and_steps(tmp_path / "d")
    taken = world.successors_VF[before] == after[:, None]
    by_chance = 0.5 / 320
    expected = 0.5 * np.array(planted.SUCCESSOR_SHARES) + by_chance
    np.testing.assert_allclose(taken.mean(axis=0), expected, atol=0.012)
    assert (np.diff(np.sort(world.successors_VF, axis=1), axis=1) > 0).all()


def test_text_steps_are_even_over_the_theme() -> None:
    world = planted.plant(64, 9.0, 1.0, 0.3, 0)
    drawn = planted.next_items(world, np.zeros(160_000, dtype=np.int64), np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=64)
    theme = np.flatnonzero(world.theme_V == world.pointer_V[0])
    assert set(np.flatnonzero(counts)) == set(theme)
    np.testing.assert_allclose(counts[theme] / len(drawn), 1 / len(theme), rtol=0.05)


def test_rare_items_are_reached_through_text_only(tmp_path: Path) -> None:
    generate(tmp_path / "d", text_share=0.5, items=320, rare_share=0.4)
    world = planted.plant(320, 9.0, 0.5, 0.4, 0)
    rare = np.setdiff1d(np.arange(320), world.common)
    assert len(rare) == 128
    words, before, after = _titles_and_steps(tmp_path / "d")
    into_rare = np.isin(after, rare)
    assert into_rare.sum() > 1000
    assert all(words[i][-1] == words[j][0] for i, j in zip(before[into_rare], after[into_rare], strict=True))


def test_side_features_and_description_do_not_tell_the_theme(tmp_path: Path) -> None:
    generate(tmp_path / "d", items=3200)
    items = pq.read_table(tmp_path / "d" / "items.parquet").to_pydict()
    themes = {title.split()[0] for title in items["title"]}
    for column in ("category", "brand", "description"):
        told = {word.strip(".") for text in items[column] for word in text.split()}
        assert not told & themes, column


def test_same_seed_same_bytes_and_another_seed_other_sessions(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        generate(tmp_path / name, seed=seed)
    for file in ("interactions.parquet", "items.parquet"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b
        assert a != c


def test_a_longer_run_starts_a_new_chunk_without_changing_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "CHUNK_SESSIONS", 100)
    world = planted.plant(64, 9.0, 0.5, 0.3, 0)
    short = [items for items, _, _ in planted.sessions(world, 100)]
    longer = [items for items, _, _ in planted.sessions(world, 250)]
    assert len(longer) == 3
    np.testing.assert_array_equal(short[0], longer[0])
    assert not np.array_equal(longer[0][:50], longer[1][:50])


def test_shuffled_titles_keep_the_sessions_and_lose_the_rule(tmp_path: Path) -> None:
    generate(tmp_path / "told", items=640)
    generate(tmp_path / "control", items=640, shuffle_titles=True)
    assert (tmp_path / "told/interactions.parquet").read_bytes() == (
        tmp_path / "control/interactions.parquet"
    ).read_bytes()
    told, control = (pq.read_table(tmp_path / n / "items.parquet")["title"].to_pylist() for n in ("told", "control"))
    assert told != control
    assert sorted(told) == sorted(control)
    assert _share_told_by_titles(tmp_path / "told") > 0.48
    assert _share_told_by_titles(tmp_path / "control") < 0.05


def test_lengths_and_times(tmp_path: Path) -> None:
    generate(tmp_path / "d", mean_length=7.5)
    rows = pq.read_table(tmp_path / "d/interactions.parquet").to_pydict()
    users, lengths = np.unique(rows["user_id"], return_counts=True)
    assert len(users) == 2000
    assert lengths.min() >= planted.SHORTEST_SESSION
    assert lengths.mean() == pytest.approx(7.5, abs=0.15)
    inside = np.array(rows["user_id"])[1:] == np.array(rows["user_id"])[:-1]
    assert (np.diff(rows["timestamp"])[inside] > 0).all()


def test_theme_words_are_distinct() -> None:
    words = [planted.theme_word(i) for i in range(50_000)]
    assert len(set(words)) == len(words)
    assert all(word.isalpha() for word in words)


def test_oracle_tells_reading_from_counting() -> None:
    dense, sparse = oracle_hit_rate(items=500), oracle_hit_rate(items=6000)
    for rates in (dense, sparse):
        assert rates["table"] <= rates["pairs"] <= rates["ids"] <= rates["ids_and_text"]
        assert rates["ids_and_text"] == pytest.approx(1.0, abs=1e-9)
    assert dense["pairs"] < 0.82
    assert sparse["ids"] < 0.62


def test_oracle_equals_a_plain_replay() -> None:
    """The closed form against predictors that really rank, on the real last clicks."""
    sessions, items = 4000, 320
    world = planted.plant(items, 9.0, 0.5, 0.3, 1)
    ((clicks, offsets, _),) = planted.sessions(world, sessions)
    walks = [clicks[a:b] for a, b in pairwise(offsets)]
    seen: dict[int, set[int]] = {}
    for walk in walks:
        for i, j in pairwise(walk[:-2]):
            if world.theme_V[j] == world.pointer_V[i]:
                seen.setdefault(int(i), set()).add(int(j))
    hits = {"table": 0, "pairs": 0, "ids_and_text": 0}
    for walk in walks:
        last, target = int(walk[-2]), int(walk[-1])
        table = set(world.successors_VF[last].tolist())
        hits["table"] += target in table
        hits["pairs"] += target in table | seen.get(last, set())
        hits["ids_and_text"] += target in table or world.theme_V[target] == world.pointer_V[last]
    expected = planted.oracle_hit_rate(world, sessions)
    for name, count in hits.items():
        # Three standard errors, and for the first two the guesses in the slots left over (16 of 316 items at most).
        slack = 0.0 if name == "ids_and_text" else 0.026
        assert -0.024 <= expected[name] - count / sessions <= 0.024 + slack, name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("items", "8"),
        ("text_share", "1.5"),
        ("sessions", "0"),
        ("mean_length", "1"),
        ("rare_share", "1"),
        ("seed", "-1"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"--{option} is .* must lie between"):
        main(["--output", str(tmp_path / "d"), f"--{option}={value}"])
    assert not list(tmp_path.iterdir())


def test_output_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        main(["--output", str(tmp_path)])
    with pytest.raises(UserError, match="is a file"):
        main(["--output", str(tmp_path / "kept")])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_command_line_prints_the_oracle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(tmp_path / "d"), "--sessions", "300", "--items", "100", "--shuffle_titles", "--oracle"])
    assert "ids_and_text 1.000" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["interactions.parquet", "items.parquet"]


@pytest.mark.parametrize("module", ["synthetic", "movielens", "amazon", "csv"])
def test_help_is_quick_and_imports_nothing_heavy(module: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", f"datagen.{module}", "--help"], capture_output=True, text=True, check=True
    )
    assert "--output" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, which does not depend on what else runs on the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    heavy = "('numpy', 'pyarrow', 'duckdb', 'torch', 'pandas')"
    code = f"import sys, datagen.{module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .*file is a file; give the path of a folder"):
        generate(tmp_path / "file" / "below")
