"""Text of shops is HTML more often than not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datagen.sources import clean_text


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("Tom &amp; Jerry&#39;s", "Tom & Jerry's"),
        ("a\n\t b\u00a0 c ", "a b c"),
        ("<p>one</p><br/>two", "one two"),
        ("5 < 6 and <3 hearts", "5 < 6 and <3 hearts"),
        ("<!-- a > b\n-->one", "one"),
        ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
        ("  ", None),
        ("<br>", None),
        (None, None),
        (7, None),
    ],
)
def test_clean_text(raw: object, plain: str | None) -> None:
    assert clean_text(raw) == plain


@given(st.text())
def test_clean_text_is_one_line_without_outer_blanks(raw: str) -> None:
    plain = clean_text(raw)
    assert plain is None or (plain == " ".join(plain.split()) and plain)
