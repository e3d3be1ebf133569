"""Joiners are shown where a script or an emoji asks for them, and nowhere else; held to the standard's own patterns."""

import sys
import unicodedata

import pytest
import regex  # a library of transformers, which knows the properties of characters that Python does not
from hypothesis import given
from hypothesis import strategies as st

from chrysalis_ray.core import joiners
from chrysalis_ray.core.printable import markdown_line, printable, printable_json

LETTER_AND_VIRAMA = r"(?<=\p{L}\p{Mn}*\p{ccc=9}[\p{Mn}--\p{ccc=0}]*)"
PICTOGRAPH = r"[\u2190-\u21ff\u2300-\u23ff\u2600-\u27bf\u2b00-\u2bff\U0001f300-\U0001f3fa\U0001f400-\U0001faff]"
IN_USE = regex.compile(
    "|".join(
        [
            r"(?<=[\p{jt=D}\p{jt=L}]\p{jt=T}*)\u200c(?=\p{jt=T}*[\p{jt=D}\p{jt=R}])",  # UAX #31, A1
            LETTER_AND_VIRAMA + r"\u200c(?=[\p{Mn}--\p{ccc=0}]*\p{L})",  # A2
            LETTER_AND_VIRAMA + r"\u200d(?!\p{InSC=Vowel_Dependent})",  # B
            rf"(?<={PICTOGRAPH}[\ufe0f\U0001f3fb-\U0001f3ff]?)\u200d(?={PICTOGRAPH})",  # UTS #51, ED-16
            "(?<=\u09b0)\u200d(?=\u09cd\u09af)",
        ]
    ),
    regex.V1,
)

WRITTEN = {
    "Persian": "\u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645.txt",  # "I do not want"
    "Persian, a vowel mark before it": "\u0645\u06cc\u0650\u200c\u0634\u0648\u062f",
    "Hindi, no conjunct": "\u0915\u094d\u200c\u0937",
    "Hindi, a half form": "\u0915\u094d\u200d\u0937",
    "Sinhala": "\u0dc1\u0dca\u200d\u0dbb\u0dd3 \u0dbd\u0d82\u0d9a\u0dcf",  # "Sri Lanka"
    "Malayalam chillu": "\u0d05\u0d35\u0d28\u0d4d\u200d",
    "Bengali ya-phalaa": "\u09b0\u200d\u09cd\u09af\u09be\u09ac",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "an astronaut of a skin tone": "\U0001f469\U0001f3fd\u200d\U0001f680",
    "a heart on fire": "\u2764\ufe0f\u200d\U0001f525",
    "a head that shakes": "\U0001f642\u200d\u2194\ufe0f",
}
HIDING = {
    "between Latin letters": ("pay\u200cpal", r"pay\u200cpal"),
    "a joiner between Latin letters": ("pay\u200dpal", r"pay\u200dpal"),
    "at the end": ("\u0645\u06cc\u200c", "\u0645\u06cc\\u200c"),
    "at the beginning": ("\u200c\u0645\u06cc", "\\u200c\u0645\u06cc"),
    "after a letter that joins nothing": ("\u0627\u200c\u0628", "\u0627\\u200c\u0628"),
    "twice": ("\u06cc\u200c\u200c\u062e", "\u06cc\\u200c\\u200c\u062e"),
    "a joiner where letters join anyway": ("\u06cc\u200d\u062e", "\u06cc\\u200d\u062e"),
    "an override beside it": ("\u06cc\u202e\u200c\u062e", "\u06cc\\u202e\\u200c\u062e"),
    "before a vowel sign": ("\u0915\u094d\u200d\u093e", "\u0915\u094d\\u200d\u093e"),
    "without a virama": ("\u0915\u200c\u0937", "\u0915\\u200c\u0937"),
    "a virama on nothing": ("\u094d\u200d\u0937", "\u094d\\u200d\u0937"),
    "after one emoji": ("\U0001f468\u200d", "\U0001f468\\u200d"),
    "between an emoji and a letter": ("\U0001f468\u200da", "\U0001f468\\u200da"),
    "alone": ("\u200d", r"\u200d"),
}


@pytest.mark.parametrize("name", WRITTEN.values(), ids=WRITTEN)
def test_what_is_written_with_joiners_is_shown_as_it_is_written(name: str) -> None:
    assert printable(name) == name
    assert markdown_line(name) == name
    assert printable_json([name]) == f'["{name}"]'


@pytest.mark.parametrize(("name", "shown"), HIDING.values(), ids=HIDING)
def test_joiners_that_show_nothing_are_written_out(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert markdown_line(name) == shown
    assert printable_json([name]) == f'["{shown}"]'


ALPHABET = (
    "\u200c\u200d\u200c\u200d\u0628\u06cc\u0627\u062f\u0650\u0651\ua872\u0915\u0937\u094d\u093c\u093f\u0951\u09b0\u09cd\u09af"
    "\u1b44a1 \n\U0001f468\U0001f3fd\ufe0f\u2764"
)


@given(st.text(ALPHABET, max_size=12))
def test_they_are_in_use_where_the_patterns_of_the_standard_say(text: str) -> None:
    expected = {found.start() for found in IN_USE.finditer(text)}
    assert {place for place in range(len(text)) if joiners.is_joiner_in_use(text, place)} == expected


def test_the_tables_are_those_of_unicode() -> None:
    """Of every character that Python knows."""
    known = [
        character for character in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(character) not in ("Cn", "Cs")
    ]
    text = "".join(known)
    for table, pattern in ((joiners._JOINS_THE_NEXT, r"[\p{jt=D}\p{jt=L}]"), (joiners._JOINS_THE_LAST, r"[\p{jt=D}\p{jt=R}]")):
        assert joiners._characters(table) & set(known) == set(regex.findall(pattern, text))
    indic = "".join(character for character in known if "\u0900" <= character <= "\u0dff")
    signs = {character for character in indic if joiners._is_vowel_sign(character)}
    assert set(regex.findall(r"\p{InSC=Vowel_Dependent}", indic)) - signs == {"\u0b55"}  # Oriya's overline, of no such name
    assert signs <= set(regex.findall(r"\p{InSC=Vowel_Dependent}", indic))


def test_a_name_of_nothing_but_marks_and_joiners_takes_no_long_time() -> None:
    """Looked at from every joiner, each run of marks is walked over twice, not every time."""
    text = ("\u0650" * 50 + "\u200c") * 4000
    assert printable(text).count("\\u200c") == 4000
