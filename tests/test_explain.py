"""The command that explains a session."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmgr_rec import Recommender, UserError
from llmgr_rec.explain import main
from tests.small_run import small_run


def run() -> list[str]:
    return ["--run", str(small_run().run / "export" / "sbr")]


def test_prints_what_the_recommender_explains(capsys: pytest.CaptureFixture[str]) -> None:
    main([*run(), "--items", "i3, i5,i3", "--k", "2"])
    expected = Recommender.load(small_run().run / "export" / "sbr").explain(["i3", "i5", "i3"], k=2)
    assert capsys.readouterr().out == expected.to_text()


def test_ids_may_contain_commas(capsys: pytest.CaptureFixture[str]) -> None:
    main([*run(), "--items", '["i3", "a,b"]', "--explain_items", '["i7"]'])
    printed = capsys.readouterr().out
    assert "2. item a,b (not used: unknown item)" in printed
    assert printed.count("(score ") == 1


@pytest.mark.parametrize("suffix", [".json", ".txt", ".svg", ".html"])
def test_writes_the_format_of_the_suffix(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = {"session_id": ["a", "b", "c", "c"], "items": [["i1"], ["i3", "i5"], ["i1"], ["i1"]]}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    output = tmp_path / f"explanation{suffix}"
    main([*run(), "--input", str(tmp_path / "in.parquet"), "--session", "b", "--output", str(output), "--k", "1"])
    assert capsys.readouterr().out == f"explain: explained items: 1; wrote {output}\n"
    content = output.read_text()
    if suffix == ".json":
        assert [click["item_id"] for click in json.loads(content)["clicks"]] == ["i3", "i5"]
    assert content.startswith({".json": "{", ".txt": "Session:", ".svg": "<svg", ".html": "<!DOCTYPE html>"}[suffix])
    for session, message in (("d", "has no session with session_id d; its first is a"), ("c", "has 2 sessions")):
        with pytest.raises(UserError, match=message):
            main([*run(), "--input", str(tmp_path / "in.parquet"), "--session", session])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --items, or --input and --session"),
        (["--items", "i1", "--session", "b"], "give either --items, or --input and --session"),
        (["--items", "[i1"], "--items is no JSON list"),
        (["--items", "i1", "--output", "x.png"], r"--output x\.png ends in \.png; give one of \.txt"),
        (["--items", "i1", "--k", "0"], "k is 0"),
        (["--items", "i1", "--explain_items", "nothing"], "item 'nothing' is not in the catalog"),
        (["--items", '["i1", 2]'], "item ids must all be integers or all text"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        main([*run(), *words])
    assert "\n" not in str(raised.value)
