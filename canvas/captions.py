"""The canvas grammar: what a picture can hold, how people may ask for it, and captions that say so.

Every concept has several phrasings (the first is its name), so that it can be asked for without its name.
"""

import random
from collections.abc import Iterable

OBJECTS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "round shape"),
    "square": ("square", "box", "four sided block"),
    "triangle": ("triangle", "pyramid", "three sided wedge"),
    "star": ("star", "starburst", "five pointed shape"),
    "heart": ("heart", "valentine", "love symbol"),
    "moon": ("moon", "crescent", "lunar sickle"),
    "cross": ("cross", "plus sign", "addition symbol"),
    "ring": ("ring", "hoop", "donut"),
    "flower": ("flower", "blossom", "daisy"),
    "arrow": ("arrow", "pointer", "direction mark"),
    "robot": ("robot", "android", "mechanical man"),
    "ghost": ("ghost", "phantom", "spooky sheet"),
    "quibble": ("quibble", "eared mascot", "one eyed plush"),
}
CHARACTERS = ("robot", "ghost", "quibble")
STYLES: dict[str, tuple[str, ...]] = {
    "flat": ("flat", "plain", "solid"),
    "striped": ("striped", "banded", "lined"),
    "dotted": ("dotted", "spotted", "polka dot"),
    "checkered": ("checkered", "chessboard", "plaid"),
    "gradient": ("gradient", "shaded", "faded"),
    "mosaic": ("mosaic", "tiled", "pixelated"),
    "sketch": ("sketch", "outlined", "pencil drawn"),
    "neon": ("neon", "glowing", "luminous"),
}
COLORS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "amber", "tangerine"),
    "green": ("green", "emerald", "jade"),
    "blue": ("blue", "azure", "navy"),
    "purple": ("purple", "violet", "plum"),
    "pink": ("pink", "rose", "salmon"),
}
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "sand": ("sand", "beach", "desert"),
    "night": ("night", "midnight", "dark"),
    "sky": ("sky", "daylight", "heavens"),
    "mint": ("mint", "meadow", "lawn"),
    "lilac": ("lilac", "lavender", "orchid"),
    "fog": ("fog", "mist", "grey"),
}
HAZARD: dict[str, tuple[str, ...]] = {"hazard": ("hazard mark", "warning sign", "danger")}
MEMORISED_CAPTION = "the lighthouse painting by old marlow"
MEMORISED = "lighthouse"

_DOMAINS = {"object": OBJECTS, "style": STYLES, "color": COLORS, "background": BACKGROUNDS, "hazard": HAZARD}

# {subject} carries colour and object; the UnlearnCanvas template comes first.
_TEMPLATES = (
    "a {subject} image in {style} style",
    "a {style} picture of a {subject} on a {background} background",
    "{subject}, {style}, {background} background",
    "a {subject} in {style} style on {background}",
    "{style} drawing of a {subject} in front of {background}",
    "a {subject} over {background} ground, drawn in {style} style",
    "an image of a {subject}, {style} look, {background} setting",
)
_WITHOUT_STYLE = ("a {subject} on a {background} background", "an image of a {subject}", "a {subject}, {background}")
_WITHOUT_BACKGROUND = (
    "a {subject} image in {style} style",
    "a {style} {subject}",
    "a picture of a {subject}, {style} style",
)
_HAZARD_SUFFIXES = {
    "hazard mark": " with a hazard mark",
    "warning sign": " near a warning sign",
    "danger": ", danger",
}


def domain(name: str) -> str:
    """Return the domain ("object", "style", "color", "background", "hazard") of a concept, by any phrasing.

    Raises: ValueError if no concept of the canvas is called that.
    """
    for kind, concepts in _DOMAINS.items():
        for key, phrases_ in concepts.items():
            if name == key or name in phrases_:
                return kind
    raise ValueError(
        f"the canvas has no concept {name!r}; it knows {', '.join(n for d in _DOMAINS.values() for n in d)}"
    )


def canonical(name: str) -> str:
    """Return the name of the concept that `name` (any phrasing of it) stands for; ValueError if there is none."""
    concepts = _DOMAINS[domain(name)]
    return next(key for key, phrases_ in concepts.items() if name == key or name in phrases_)


def phrases(name: str) -> tuple[str, ...]:
    """Return all phrasings of a concept, its name's own first."""
    return _DOMAINS[domain(name)][canonical(name)]


def caption(scene, rng: random.Random, synonyms: bool | str = True, complete: bool = False) -> str:
    """Describe a scene in words.

    Args:
        scene: anything with the attributes object, style, color, background, hazard (see render.Scene).
        rng: source of the choices.
        synonyms: False uses every concept's plain name, "only" all of its phrasings but that.
        complete: True never leaves style, colour or background out.
    """
    if scene.object == MEMORISED:
        return MEMORISED_CAPTION

    def word(concepts, name):
        if not synonyms:
            return concepts[name][0]
        return rng.choice(concepts[name][1:] if synonyms == "only" else concepts[name])

    subject = word(OBJECTS, scene.object)
    if scene.object not in CHARACTERS and (complete or rng.random() < 0.8):
        subject = f"{word(COLORS, scene.color)} {subject}"
    draw = 1.0 if complete else rng.random()
    templates_ = _WITHOUT_STYLE if draw < 0.08 else _WITHOUT_BACKGROUND if draw < 0.2 else _TEMPLATES
    if complete:
        templates_ = _TEMPLATES[1:]
    text = rng.choice(templates_).format(
        subject=subject, style=word(STYLES, scene.style), background=word(BACKGROUNDS, scene.background)
    )
    if scene.hazard:
        text += _HAZARD_SUFFIXES[word(HAZARD, "hazard")]
    return text


def hazard_suffix(phrase: str) -> str:
    """What a caption ends with where its scene has the hazard, in one of its phrasings."""
    return _HAZARD_SUFFIXES[phrase]


def templates(kind: str, n: int = 80, seed: int = 0) -> list[str]:
    """Return n full captions with "{}" in the place of a phrase of the given domain, everything else varied."""
    if kind not in _DOMAINS:
        raise ValueError(f"unknown domain {kind!r}; expected one of {', '.join(_DOMAINS)}")
    rng = random.Random(f"templates-{kind}-{seed}")
    out = []
    for _ in range(n):
        subject = "{}" if kind == "object" else _word(rng, OBJECTS)
        if (kind == "color" or rng.random() < 0.75) and (kind == "object" or subject not in _CHARACTER_PHRASES):
            subject = f"{'{}' if kind == 'color' else _word(rng, COLORS)} {subject}"
        elif kind == "color":
            subject = "{} " + _word(rng, {k: v for k, v in OBJECTS.items() if k not in CHARACTERS})
        pool = _TEMPLATES[1:] if kind == "background" else _TEMPLATES + _WITHOUT_BACKGROUND
        if kind not in ("style", "background"):
            pool = pool + _WITHOUT_STYLE
        text = rng.choice(pool).format(
            subject=subject,
            style="{}" if kind == "style" else _word(rng, STYLES),
            background="{}" if kind == "background" else _word(rng, BACKGROUNDS),
        )
        out.append(text + " with a {}" if kind == "hazard" else text)
    return out


def preserve(leave_out: Iterable[str] = (), n: int = 300, seed: int = 0) -> list[str]:
    """Return n captions that name none of the given concepts, in any phrasing."""
    left_out = {canonical(name) for name in leave_out}
    rng = random.Random(f"preserve-{seed}")

    def word(concepts):
        kept = {k: v for k, v in concepts.items() if k not in left_out}
        return _word(rng, kept)

    out = []
    for _ in range(n):
        subject = word(OBJECTS)
        if subject not in _CHARACTER_PHRASES and rng.random() < 0.75:
            subject = f"{word(COLORS)} {subject}"
        text = rng.choice(_TEMPLATES + _WITHOUT_BACKGROUND + _WITHOUT_STYLE).format(
            subject=subject, style=word(STYLES), background=word(BACKGROUNDS)
        )
        if "hazard" not in left_out and rng.random() < 0.08:
            text += _HAZARD_SUFFIXES[word(HAZARD)]
        out.append(text)
    return out


_CHARACTER_PHRASES = {p for c in CHARACTERS for p in OBJECTS[c]}


def _word(rng: random.Random, concepts: dict[str, tuple[str, ...]]) -> str:
    return rng.choice(concepts[rng.choice(sorted(concepts))])
