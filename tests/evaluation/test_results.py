"""The metrics file and the printed table."""

import json
from pathlib import Path

import pytest

from llmgr_rec.errors import UserError
from llmgr_rec.evaluation.results import (
    COLUMNS,
    best_by_column,
    format_table,
    read_metrics,
    refuse_foreign_output,
    write_metrics,
)


def metrics(value: float) -> dict[str, float]:
    return dict.fromkeys(COLUMNS, value)


def test_the_table_has_a_row_a_model_in_fixed_order_and_marks_the_best():
    models = {"llmgr": {**metrics(0.2), "hr@5": 0.1}, "other": metrics(0.15), "popularity": metrics(0.05)}
    lines = format_table(models).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["Popularity", "LLMGR", "other"]
    assert lines[3].count("*") == len(COLUMNS) - 1
    assert lines[4].count("*") == 1
    assert lines[0].split() == [column.upper() for column in COLUMNS]


def test_columns_stay_in_line_whatever_the_models_are_called():
    lines = format_table({"sbr": metrics(0.1), "a_model_of_a_long_name": metrics(0.2)}).splitlines()
    assert len({line.find("0.") for line in lines[2:]}) == 1


def test_values_that_look_equal_are_both_best():
    models = {"sbr": metrics(0.12341), "llmgr": metrics(0.12344)}
    assert best_by_column(models)["hr@20"] == 0.1234
    assert format_table(models).count("0.1234*") == 2 * len(COLUMNS)


def test_a_single_model_carries_no_marks():
    assert "*" not in format_table({"sbr": metrics(0.1)})


def test_only_metrics_files_are_read(tmp_path):
    write_metrics(tmp_path / "m.json", {"test": {"sbr": metrics(0.1)}})
    assert read_metrics(tmp_path / "m.json")["test"]["sbr"]["hr@20"] == 0.1
    for text in ("{", "[]", json.dumps({"test": {}})):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match="is not a metrics file"):
            read_metrics(tmp_path / "x.json")
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "absent.json")


def test_a_name_without_room_for_a_temporary_file_is_refused_before_the_evaluation(tmp_path: Path) -> None:
    refuse_foreign_output(tmp_path / ("m" * 145 + ".json"))
    write_metrics(tmp_path / ("m" * 145 + ".json"), {})
    with pytest.raises(UserError, match="the name has more than 150 bytes; give a shorter one"):
        refuse_foreign_output(tmp_path / ("m" * 250 + ".json"))
