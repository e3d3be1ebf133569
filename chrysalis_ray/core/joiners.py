"""Where U+200C and U+200D say something: they show nothing by themselves, but Persian, Hindi and emoji are written with them.

A joiner stands for what a reader sees only where it parts two letters that would join, shapes a conjunct, or binds emoji into
one; elsewhere it makes two names look alike, and is hidden. The contexts are those of Unicode Standard Annex #31, section 2.3
(A1, A2, B), and of emoji ZWJ sequences (Unicode Technical Standard #51, ED-16); Bengali ya-phalaa after ra is from the Unicode
Standard, section 12.2.
"""

from __future__ import annotations

import unicodedata
from functools import cache

NON_JOINER, JOINER = "\u200c", "\u200d"

_VIRAMA = 9  # the canonical combining class
_BENGALI_RA, _BENGALI_YA_PHALAA = "\u09b0", "\u09cd\u09af"
_EMOJI_STYLE = "\ufe0f"
_SKIN_TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
_PICTOGRAPHS = ((0x2190, 0x21FF), (0x2300, 0x23FF), (0x2600, 0x27BF), (0x2B00, 0x2BFF), (0x1F300, 0x1FAFF))  # their blocks

# Joining_Type Dual_Joining and Left_Joining; Dual_Joining and Right_Joining (DerivedJoiningType.txt of Unicode 17).
_JOINS_THE_NEXT = (
    "620 626 628 62a-62e 633-63f 641-647 649-64a 66e-66f 678-687 69a-6bf 6c1-6c2 6cc 6ce 6d0-6d1 6fa-6fc 6ff 712-714 "
    "71a-71d 71f-727 729 72b 72d-72e 74e-758 75c-76a 76d-770 772 775-777 77a-77f 7ca-7ea 841-845 848 84a-853 855 860 "
    "862-865 868 886 889-88d 88f 8a0-8a9 8af-8b0 8b3-8b8 8ba-8c8 1807 1820-1878 1887-18a8 18aa a840-a872 10ac0-10ac4 10acd "
    "10ad3-10adc 10ade-10ae0 10aeb-10aee 10b80 10b82 10b86-10b88 10b8a-10b8b 10b8d 10b90 10bad-10bae 10d00-10d21 10d23 "
    "10ec3-10ec4 10ec6-10ec7 10ed9-10eee 10f30-10f32 10f34-10f44 10f51-10f53 10f70-10f73 10f76-10f81 10fb0 10fb2-10fb3 "
    "10fb8 10fbb-10fbc 10fbe-10fbf 10fc1 10fc4 10fca-10fcb 1e900-1e943"
)
_JOINS_THE_LAST = (
    "620 622-63f 641-64a 66e-66f 671-673 675-6d3 6d5 6ee-6ef 6fa-6fc 6ff 710 712-72f 74d-77f 7ca-7ea 840-858 860 862-865 "
    "867-882 886 889-88f 8a0-8ac 8ae-8c8 1807 1820-1878 1887-18a8 18aa a840-a871 10ac0-10ac5 10ac7 10ac9-10aca 10ace-10ad6 "
    "10ad8-10ae1 10ae4 10aeb-10aef 10b80-10b91 10ba9-10bae 10d01-10d23 10ec2-10ec4 10ec6-10ec7 10f30-10f44 10f51-10f54 "
    "10f70-10f81 10fb0 10fb2-10fb6 10fb8-10fbf 10fc1-10fc4 10fc9-10fca 1e900-1e943"
)


def is_joiner_in_use(text: str, place: int) -> bool:
    """Whether `text` holds a joiner at `place` that a reader can see the work of."""
    if text[place] == NON_JOINER:
        return _parts_letters(text, place) or (_after_virama(text, place) and _letter_after(text, place))
    if text[place] == JOINER:
        return (_after_virama(text, place) and not _is_vowel_sign(text[place + 1 : place + 2])) or _binds(text, place)
    return False


def _parts_letters(text: str, place: int) -> bool:
    """A1: between two letters that would join if it were not there."""
    before, after = place - 1, place + 1
    while before >= 0 and _is_transparent(text[before]):
        before -= 1
    while after < len(text) and _is_transparent(text[after]):
        after += 1
    if before < 0 or after == len(text):
        return False
    return text[before] in _characters(_JOINS_THE_NEXT) and text[after] in _characters(_JOINS_THE_LAST)


def _after_virama(text: str, place: int) -> bool:
    """A2 and B, what comes before: a letter and its marks, the last of them that is more than a diacritic a virama."""
    place -= 1
    while place >= 0 and unicodedata.category(text[place]) == "Mn" and unicodedata.combining(text[place]) not in (0, _VIRAMA):
        place -= 1
    if place < 1 or unicodedata.combining(text[place]) != _VIRAMA:
        return False
    place -= 1
    while place >= 0 and unicodedata.category(text[place]) == "Mn":
        place -= 1
    return place >= 0 and unicodedata.category(text[place]).startswith("L")


def _letter_after(text: str, place: int) -> bool:
    """A2, what comes after: a letter, diacritics before it."""
    place += 1
    while place < len(text) and unicodedata.category(text[place]) == "Mn" and unicodedata.combining(text[place]):
        place += 1
    return place < len(text) and unicodedata.category(text[place]).startswith("L")


def _binds(text: str, place: int) -> bool:
    """Emoji on both sides, or Bengali ra and ya-phalaa."""
    if text[place - 1 : place] == _BENGALI_RA and text.startswith(_BENGALI_YA_PHALAA, place + 1):
        return True
    before = place - 1
    if before >= 1 and (text[before] == _EMOJI_STYLE or text[before] in _SKIN_TONES):
        before -= 1
    return before >= 0 and _is_pictograph(text[before]) and place + 1 < len(text) and _is_pictograph(text[place + 1])


def _is_pictograph(character: str) -> bool:
    number = ord(character)
    return any(first <= number <= last for first, last in _PICTOGRAPHS) and character not in _SKIN_TONES


def _is_transparent(character: str) -> bool:
    """Joining_Type Transparent, but for format characters: those are written out and then stand between."""
    return unicodedata.category(character) in ("Mn", "Me")


def _is_vowel_sign(character: str) -> bool:
    """Indic_Syllabic_Category Vowel_Dependent, which Python knows by the names of its characters only."""
    name = unicodedata.name(character, "") if character else ""
    return "VOWEL SIGN" in name or "LENGTH MARK" in name


@cache
def _characters(ranges: str) -> frozenset[str]:
    """The characters of ranges of hex numbers."""
    found: set[str] = set()
    for written in ranges.split():
        first, _, last = written.partition("-")
        found.update(map(chr, range(int(first, 16), int(last or first, 16) + 1)))
    return frozenset(found)
