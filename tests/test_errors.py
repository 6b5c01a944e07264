"""Messages that name what was likely meant."""

from llmgr_rec.errors import near_miss


def test_a_likely_name_is_offered() -> None:
    assert near_miss("strnog", ["quickstart", "strong"]) == ", did you mean strong?"


def test_all_names_are_told_where_none_is_near() -> None:
    assert near_miss("zzz", iter(["quickstart", "strong"])) == "; known: quickstart, strong"
