"""Whether a prompt names a concept: whole phrases, found in the words that its token ids stand for.

What a text encoder was given are ids: a prompt's end may have been cut off, weights and escapes may have been taken
out. Decoded, they are text again, which is compared word by word after folding: case, accents and full-width letters,
punctuation, the plural and the possessive make no difference. A word inside another one ("cat" in "concatenate") does
not count, nor does a part of a phrase.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

__all__ = ["fold", "names", "plural", "singular"]

# English plurals that no ending tells; the commonest that name what people draw
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "wolves": "wolf", "knives": "knife", "wives": "wife", "elves": "elf",
    "leaves": "leaf", "loaves": "loaf", "thieves": "thief", "shelves": "shelf", "dwarves": "dwarf", "oxen": "ox",
    "lens": "lens", "lenses": "lens", "canvas": "canvas", "canvases": "canvas", "atlas": "atlas", "atlases": "atlas",
}  # fmt: skip
_NO_MEN = ("human", "german", "roman", "shaman", "talisman", "caiman")
_NOT_WORDS = re.compile(r"[^\w]+|_+")
_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")  # Thai, kana, ideographs: a word each
_POSSESSIVE = re.compile(r"(?<=\w)\s*['’ʼ`´]\s*s\b|(?<=s)['’ʼ`´](?!\w)", re.IGNORECASE)


def fold(text: str) -> tuple[str, ...]:
    """The words of a text as they are compared: NFKD without marks and invisible characters, casefolded, singular.

    >>> fold("Two RÓBOTS' heads, the robot's (box:1.2)")
    ('two', 'robot', 'head', 'the', 'robot', 'box', '1', '2')
    """
    text = unicodedata.normalize("NFKD", _POSSESSIVE.sub("", text))
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Cf")).casefold()
    return tuple(singular(word) for word in _NOT_WORDS.split(_UNSPACED.sub(r" \g<0> ", text)) if word)


def singular(word: str) -> str:
    """What the singular and the plural of an English word have in common, mostly the singular.

    A word that only looks like a plural loses its ending, too, and "house" its last letter, which "houses" shares with
    "buses": both sides of a comparison are treated alike.

    >>> [singular(word) for word in ("robots", "boxes", "ladies", "glass", "men", "buses", "bus", "house")]
    ['robot', 'box', 'lady', 'glass', 'man', 'bus', 'bus', 'hous']
    """
    if word in _IRREGULAR:
        word = _IRREGULAR[word]
    elif word.endswith("men") and len(word) > 4:  # firemen, but no "omen"
        word = word[:-2] + "an"
    elif word.endswith("ies") and len(word) > 4:
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        word = word[:-1]
    return word[:-1] if word.endswith(("se", "xe", "ze", "che", "she")) and len(word) > 3 else word


def plural(phrase: str) -> str:
    """The plural of a phrase: its last word's.

    >>> plural("mechanical man"), plural("box"), plural("lady"), plural("robot")
    ('mechanical men', 'boxes', 'ladies', 'robots')
    """
    before, last = phrase[: phrase.rfind(" ") + 1], phrase[phrase.rfind(" ") + 1 :]
    known = {one: many for many, one in _IRREGULAR.items()}
    if last in known:
        return before + known[last]
    if last.endswith("man") and last not in _NO_MEN:
        return before + last[:-2] + "en"
    if last.endswith(("s", "x", "z", "ch", "sh")):
        return before + last + "es"
    return before + (last[:-1] + "ies" if last.endswith("y") and last[-2:-1] not in "aeiou" else last + "s")


def names(text: str, phrases: Sequence[tuple[str, ...]]) -> bool:
    """Whether the words of a text have one of these folded phrases in a row.

    >>> names("a steampunk Robot, detailed", [fold("robots")]), names("a robotic arm", [fold("robot")])
    (True, False)
    """
    words = " " + " ".join(fold(text)) + " "
    return any(phrase and f" {' '.join(phrase)} " in words for phrase in phrases)
