"""What counts as a word."""

from llmgr_rec.data.words import words_of


def test_words():
    assert words_of("Men's T-Shirt_2 > ÉCLAIR") == ["men", "s", "t", "shirt_2", "éclair"]
    assert words_of(" -, ") == words_of(None) == []
