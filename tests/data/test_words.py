"""What counts as a word, in any script."""

# Letters of other scripts that look like Latin ones are meant.
# ruff: noqa: RUF001

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmgr_rec.data.words import words_of


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def test_words() -> None:
    assert words_of("Men's T-Shirt_2 > ÉCLAIR") == ["men", "s", "t", "shirt_2", "éclair"]
    assert words_of(" -, ") == words_of(" …、") == words_of("") == words_of(None) == []


@settings(max_examples=40)
@given(st.text(st.characters(codec="ascii")))
def test_ascii_has_the_words_that_it_always_had(text: str) -> None:
    expected = re.findall(r"\w+", text.lower())
    assert words_of(text) == expected
    # Nor do other characters elsewhere in the text change them.
    assert words_of(f"{text} é") == [*expected, "é"]


@settings(max_examples=40)
@given(st.text())
def test_encodings_of_a_text_have_the_same_words(text: str) -> None:
    words = words_of(text)
    assert words_of(nfd(text)) == words_of(unicodedata.normalize("NFC", text)) == words
    assert all(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी की किताब", ["हिन्दी", "की", "किताब"]),
        ("தமிழ் புத்தகம்", ["தமிழ்", "புத்தகம்"]),
        ("বাংলা বই", ["বাংলা", "বই"]),
        ("绿茶 iPhone15手机壳", ["绿", "茶", "绿茶", "iphone15", "手", "机", "壳", "手机", "机壳"]),
        ("緑茶ラテ", ["緑", "茶", "緑茶", "茶ラ", "ラテ"]),
        ("ｺｰﾋｰ コーヒー", ["コー", "ーヒ", "ヒー"] * 2),
        ("茶 の", ["茶", "の"]),
        ("커피원두 티", ["커피", "피원", "원두", "티"]),
        ("กาแฟ", ["กา", "าแ", "แฟ"]),
        ("น้ำ", ["น้ํา"]),
        ("ກາເຟ", ["ກາ", "າເ", "ເຟ"]),
        ("កាហ្វេ", ["កាហ្វេ"]),
        ("ကော်ဖီ", ["ကော်", "ာ်ဖီ"]),
        ("كِتَاب أحمر ٥٠٠ كتــاب", ["كتاب", "احمر", "500", "كتاب"]),
        ("שָׁלוֹם", ["שלום"]),
        ("İSTANBUL Istanbul ıstanbul", ["istanbul"] * 3),
        ("STRASSE Straße", ["strasse"] * 2),
        ("ΚΑΦΕΣ καφές", ["καφεσ"] * 2),
        ("Ёлка йод", ["ёлка", "йод"]),
        ("Tiếng VIỆT", ["tiếng", "việt"]),
        ("Nike™ Air® 2½ 360º m² №5", ["nike", "air", "2", "1", "2", "360", "m2", "no5"]),
        ("co\u00adop کتاب\u200cها a\u200bb", ["coop", "کتابها", "a", "b"]),
        ("ﬁne ＳＯＮＹ ③", ["fine", "sony", "3"]),
        ("👍🏽 ☃ ´ ˜ \u0301", []),
    ],
)
def test_words_of_other_scripts(text: str, words: list[str]) -> None:
    assert words_of(text) == words_of(nfd(text)) == words


def test_long_texts_are_split_in_linear_time() -> None:
    """A quadratic rule would take minutes."""
    for text in ("a" + "\u0301" * 200_000, "\u05d0" + "\u05b0" * 200_000, "\u200d" * 200_000 + "é"):
        assert len(words_of(text)) == 1
    assert len(words_of("中" * 100_000)) == 199_999
