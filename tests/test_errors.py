"""Suggestions in messages about unknown names."""

from llmgr_rec.errors import did_you_mean


def test_the_closest_name_is_suggested() -> None:
    assert did_you_mean("defualt", ["quickstart", "default"]) == ", did you mean default?"


def test_all_names_are_listed_if_none_is_close() -> None:
    assert did_you_mean("zzz", iter(["quickstart", "default"])) == "; known: quickstart, default"
