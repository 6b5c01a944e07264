"""Messages that name what was likely meant."""

from llmgr_rec.errors import did_you_mean


def test_a_likely_name_is_offered() -> None:
    assert did_you_mean("strnog", ["quickstart", "strong"]) == ", did you mean strong?"


def test_all_names_are_told_where_none_is_near() -> None:
    assert did_you_mean("zzz", iter(["quickstart", "strong"])) == "; known: quickstart, strong"
