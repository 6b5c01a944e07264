"""A short soak of the commands that start fast; `python -m tests.soak` is the whole."""

import pytest

from tests.soak.__main__ import main


@pytest.mark.slow
def test_a_short_soak(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--minutes", "0.5", "--steps", "datagen.csv; datagen.amazon; prepare"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "passed: " in said.out
