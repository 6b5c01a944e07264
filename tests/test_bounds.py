"""What a value may be, and how it is shown in a message."""

from typing import Any

import pytest

from llmgr_rec.bounds import Bounds, check_options, shown
from llmgr_rec.cli import make_parser, parse_args
from llmgr_rec.config import Config, settings
from llmgr_rec.errors import UserError


@pytest.mark.parametrize(
    ("bounds", "value", "problem"),
    [
        (Bounds(), 10**40, "give a number of at most 9223372036854775807"),
        (Bounds(), -(10**40), "give a number of at most 9223372036854775807"),
        (Bounds(), 2**63 - 1, ""),
        (Bounds(), 1e308, ""),
        (Bounds(), float("nan"), "give a finite number"),
        (Bounds(at_most=8), 9, "give 8 at most"),
        (Bounds(), None, "give a value, or leave the setting out"),
        (Bounds(), [1.0, None], "give a value, or leave the setting out"),
        (Bounds(), ["title", "title"], "name each once"),
        (Bounds(), ["title", "brand"], ""),
        (Bounds(), "a\0b", "leave out the null character"),
        (Bounds(), ["a", "\udc80"], "give text in UTF-8"),
        (Bounds(), "s3://b", ""),
        (Bounds(is_path=True), "s3://b", "give a path on this machine, because remote storage is not supported here"),
        (Bounds(is_path=True), "", "give the path of a file or folder"),
    ],
)
def test_a_value_out_of_bounds_is_named(bounds: Bounds, value: Any, problem: str) -> None:
    assert bounds.problem(value) == problem


def test_options_without_bounds_of_their_own_are_checked_too() -> None:
    check_options({"k": None, "name": "x", "share": 0.5}, {"k": Bounds(at_least=1)})
    with pytest.raises(UserError, match="--k is 0; give 1 or more"):
        check_options({"k": 0}, {"k": Bounds(at_least=1)})
    parser = make_parser("llmgr_rec.score", "Scores.")
    parser.add_argument("--share", type=float)
    parser.add_argument("--names", type=list[str])
    for word, message in {
        "--share=.nan": "--share is nan; give a finite number",
        "--share=1e400": "--share is inf; give a finite number",
        "--names=[a,a]": r"--names is \['a', 'a'\]; name each once",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_args(parser, [word])


def test_a_value_in_a_message_is_short_and_can_be_printed() -> None:
    assert shown("runs/a") == "runs/a"
    assert shown("") == "''"
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 500) == "x" * 100 + "..."


def test_every_number_of_a_run_has_a_largest_value() -> None:
    """So that no typing mistake asks for all memory or for an endless run."""
    for one in settings(Config()):
        values = one.value if isinstance(one.value, list) else [one.value]
        if any(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            assert one.info.at_most is not None or one.info.below is not None, one.name
