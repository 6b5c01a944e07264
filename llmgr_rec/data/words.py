"""Splits texts of any script into words, for the word feature, text-kNN and cold-item smoothing.

Scripts that are written without spaces have no words to find without a dictionary. Their words here are all pairs of
neighboring characters, as in the CJK analyzer of Lucene, and single Chinese characters, which are words often enough.
"""

import re
import unicodedata
from operator import add

import regex

# Raised when texts are split in another way. Data sets record it, because they store ids of the words of titles.
WORD_RULE = 2

_ASCII_WORD = re.compile(r"\w+")
# Signs whose compatibility form would join the word or number before them, such as Nike™, 2½ and 360º.
_APART = re.compile("[¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞↉]|([™℠ºª])")
# Marks that may be left out in writing: vowel signs of Arabic and Hebrew, and accents of Greek, which capitals lack.
_OPTIONAL_MARKS = regex.compile(r"([\p{Arabic}\p{Hebrew}\p{Syriac}\p{Greek}])\p{Mn}+")
# Invisible characters such as soft hyphens and joiners. A space without width separates words, and stays.
_IGNORABLE = regex.compile(r"[\p{Default_Ignorable_Code_Point}\N{ARABIC TATWEEL}--\u200b]+", regex.V1)
_OTHER_DIGITS = regex.compile(r"[\p{Nd}--[0-9]]", regex.V1)
# Scripts without spaces, whose units are characters (first) or characters with their marks (second).
_CHARACTERS = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Hangul}\u30fc&&\w]"
_CLUSTERS = r"[[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tai_Tham}\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Viet}]&&\w]"
_UNSPACED = regex.compile(f"{_CHARACTERS}|{_CLUSTERS}", regex.V1)
_WORD = regex.compile(r"(?!\p{M})\w+")
_RUN = regex.compile(rf"({_CHARACTERS}+)|({_CLUSTERS}+)|(?!\p{{M}})[\w--{_CHARACTERS}--{_CLUSTERS}]+", regex.V1)
_HAN = regex.compile(r"\p{Han}")
_CLUSTER = regex.compile(r"\X")


def words_of(text: str | None) -> list[str]:
    """Words of a text, folded by `fold`, with repetitions; in order except for pairs.

    A word is a maximal run of letters with their marks, digits and underscores; for Chinese, Japanese and Korean a pair
    of neighboring characters, and every Chinese character; for Thai, Lao, Khmer, Burmese and Tai scripts a pair of
    neighboring characters with their marks. A run of one character is a word.
    """
    if not text:
        return []
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    folded = fold(text)
    if not _UNSPACED.search(folded):
        return _WORD.findall(folded)
    words: list[str] = []
    for match in _RUN.finditer(folded):
        characters, clusters = match.groups()
        if characters:
            if len(characters) > 1:
                words += _HAN.findall(characters)
            words += _pairs(characters)
        elif clusters:
            words += _pairs(_CLUSTER.findall(clusters))
        else:
            words.append(match.group())
    return words


def fold(text: str) -> str:
    """One spelling for texts that differ by case or encoding only.

    Compatibility forms are decomposed (Unicode NFKD), case is folded, characters are composed again (NFC). Invisible
    characters and optional marks are removed, digits of all scripts become those of ASCII, and the dotted and dotless i
    of Turkish become i, because capitals do not say which one is meant without knowing the language.
    """
    text = _APART.sub(lambda sign: " " if sign[1] else f" {sign[0]} ", text)
    text = unicodedata.normalize("NFKD", text).casefold()
    text = unicodedata.normalize("NFKD", text).replace("i\u0307", "i").replace("\u0131", "i")
    text = _OPTIONAL_MARKS.sub(r"\1", _IGNORABLE.sub("", text))
    text = _OTHER_DIGITS.sub(lambda digit: str(unicodedata.digit(digit.group(), digit.group())), text)
    return unicodedata.normalize("NFC", text)


def _pairs(units: "str | list[str]") -> list[str]:
    """Pairs of neighboring units; a single unit as it is."""
    return list(map(add, units, units[1:])) or list(units)
