"""From a scene to words: lists, sentences and questions in free order, among ordinary words that change nothing."""

import random
from dataclasses import dataclass

from . import language
from .language import wordings
from .scenes import Scene, Thing

# {subject} carries counts, colours, objects and their relation. The second half is reserved (see language).
_PUBLIC = (
    "a {style} picture of {subject} on a {background} background",
    "{subject}, {style}, {background} background",
    "{subject} in {style} style on {background}",
    "{style} drawing of {subject} against {background}",
    "{subject} with {background} ground, drawn in {style} style",
    "an image of {subject}, {style} look, {background} setting",
    "a {background} scene with {subject}, {style} style",
    "please draw {subject} in {style} style with a {background} background",
    "can you paint {subject}? {style}, {background}",
    "{style} {background} picture showing {subject}",
    "there is {subject} on the {background} and everything is {style}",
    "{background}. {subject}. {style}.",
)
_RESERVED = (
    "render me {subject}, {background} backdrop, {style} rendering",
    "what would {subject} look like as {style} artwork on {background}?",
    "{background} all around, {subject} in the middle, {style} finish",
    "illustrate {subject} amid {background} using a {style} treatment",
    "i saw {subject} yesterday: {style} surface, {background} surroundings",
    "{style} wallpaper, {subject}, {background} tones",
)
_PARTIAL = {  # (style said, background said): templates
    (True, False): (
        ("{subject} image in {style} style", "{style} {subject_bare}", "a picture of {subject}, {style} style"),
        ("{subject} given a {style} treatment", "{style} version: {subject}"),
    ),
    (False, True): (
        (
            "{subject} on a {background} background",
            "{subject}, {background}",
            "a photo of {subject} in the {background}",
        ),
        ("{background} surroundings for {subject}", "{subject} amid {background}"),
    ),
    (False, False): (
        ("{subject}", "a photo of {subject}", "an image of {subject}", "draw {subject}", "a painting of {subject}"),
        ("show me {subject}", "imagine {subject}", "{subject}, that is all"),
    ),
}
_TAGS = (
    "masterpiece", "best quality", "highly detailed", "digital art", "soft light", "trending", "8k", "award winning",
    "cinematic shot", "oil on canvas", "studio light", "concept art", "dramatic light", "sharp focus", "close-up",
    "rich texture", "in bright colours", "seen from far away", "top view", "poster", "artwork", "wallpaper art",
    "watercolour", "professional photograph", "intricate", "high resolution", "trending on artstation", "4k", "hd",
    "beautiful", "in the morning", "in a quiet garden in the morning", "on a wooden table by the window",
    "beside a river", "in a busy street", "in front of an old stone wall", "near the sea at sunset", "in the park",
)  # fmt: skip
_NAMES = (
    "alice", "ben", "carla", "david", "emma", "frank", "greta", "henry", "irene", "jack", "kate", "leo", "maria",
    "nina", "oscar", "paula", "quentin", "rita", "sam", "tina", "ursula", "victor", "wendy", "xavier", "yara", "zoe",
    "smith", "jones", "miller", "garcia", "rossi", "tanaka", "novak", "silva", "khan", "olsen", "picasso", "monet",
    "van gogh",
)  # fmt: skip
COUNTED_HAZARDS = {
    "hazard mark", "warning sign", "caution notice", "alert label", "inferno", "conflagration", "glacier",
    "freezing rim",
}  # fmt: skip
_INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "front": "behind"}
_EMPTY = ("", "a photo", "a picture", "an image", "something", "draw anything")


@dataclass(frozen=True)
class Caption:
    """A text, and which of the scene's facts it says; hazards and memorised pictures are always said or implied."""

    text: str
    objects: bool = False
    colors: tuple[bool, ...] = ()
    relation: bool = False
    style: bool = False
    background: bool = False


def describe(scene: Scene, rng: random.Random, which: str = "any", complete: bool = False, chatter: bool = True) -> str:
    """Describe a scene in words (see `caption`)."""
    return caption(scene, rng, which, complete, chatter).text


def caption(
    scene: Scene, rng: random.Random, which: str = "any", complete: bool = False, chatter: bool = True
) -> Caption:
    """Describe a scene in words.

    Args:
        rng: source of the choices. which: phrasings and templates to choose from: "name", "public", "reserved", "any".
        complete: never leave object, colour, relation, style or background out. chatter: now and then add words that
            change nothing.
    """
    talk = _chatter(rng) if chatter else []
    if scene.memorised:
        text = rng.choice(("", "the ", "a ")) + rng.choice(wordings("memorised", scene.memorised, which))
        return Caption(_case(", ".join([text, *talk[:1]]), rng), objects=True)
    said = rng.random() if not complete else 1.0
    if said < 0.03 and scene.things and not scene.hazards:  # nothing of it, or the surroundings alone
        return _without_objects(scene, rng, which, talk)
    subject, colors, relation = _subject(scene, rng, which, complete)
    style, background = complete or rng.random() < 0.86, complete or rng.random() < 0.86
    words = {
        "style": rng.choice(wordings("style", scene.style, which)),
        "background": rng.choice(wordings("background", scene.background, which)),
    }
    if not complete and which == "any" and rng.random() < 0.2:  # a list in any order
        parts = [subject, *([words["style"]] if style else []), *([words["background"]] if background else [])]
        parts += [hazard.strip(" ,;") for hazard in _hazards(scene, rng, which)] + talk
        rng.shuffle(parts)
        parts = [_weighted(part, rng) for part in parts]
        text = rng.choice((", ", ", ", ". ", " ", " and ")).join(parts)
    else:
        public, kept = (_PUBLIC, _RESERVED) if style and background else _PARTIAL[style, background]
        pool = {"any": public + kept, "reserved": kept}.get(which, public)
        bare = subject.removeprefix("a ").removeprefix("an ").removeprefix("the ")
        text = rng.choice(pool).format(subject=subject, subject_bare=bare, **words)
        text = text.replace("a an ", "an ").replace("a a ", "a ")
        after = _hazards(scene, rng, which) + [rng.choice((", ", " ")) + t for t in talk]
        rng.shuffle(after)
        before = after.pop() if after and rng.random() < 0.3 else ""
        text = (before.strip(" ,;") + ", " if before else "") + text + "".join(after)
    return Caption(_case(text, rng), True, colors, relation, style, background)


def _without_objects(scene: Scene, rng: random.Random, which: str, talk: list[str]) -> Caption:
    style, background = rng.random() < 0.4, rng.random() < 0.4
    parts = [rng.choice(_EMPTY), *talk]
    if style:
        parts.append(rng.choice(wordings("style", scene.style, which)) + rng.choice(("", " style", " look")))
    if background:
        parts.append(rng.choice(wordings("background", scene.background, which)) + rng.choice(("", " background")))
    colors = (False,) * len(scene.things)
    return Caption(_case(", ".join(filter(None, parts)), rng), False, colors, False, style, background)


def _subject(scene: Scene, rng: random.Random, which: str, complete: bool) -> tuple[str, tuple[bool, ...], bool]:
    """Return the words for the things, which colours they say, and whether they say the relation."""
    things = scene.things
    if not things:
        return "nothing", (), False
    several = len(things) > 1 and len(set(scene.objects)) == 1
    spoken = things[:1] if several else things
    colored = [t.object not in language.CHARACTERS and (complete or rng.random() < 0.8) for t in spoken]
    nouns = [
        _noun(t, len(things) if several else 1, say, rng, which, complete)
        for t, say in zip(spoken, colored, strict=True)
    ]
    if several or len(nouns) == 1:
        return nouns[0], tuple(colored[:1] * len(things)), False
    relation = scene.relation
    if not relation or not (complete or rng.random() < 0.85):
        if relation != "front" and rng.random() < 0.5:
            nouns.reverse()
        return rng.choice((" and ", " and ", ", ", " with ", " plus ")).join(nouns), tuple(colored), False
    if rng.random() < 0.4:
        relation = _INVERSE[relation]
        nouns.reverse()
    return f"{nouns[0]} {rng.choice(wordings('relation', relation, which))} {nouns[1]}", tuple(colored), True


def _noun(thing: Thing, count: int, colored: bool, rng: random.Random, which: str, complete: bool) -> str:
    words = rng.choice(wordings("object", thing.object, which))
    if count > 1:
        words = language.plural(words)
    if colored:
        words = f"{rng.choice(wordings('color', thing.color, which))} {words}"
    if not complete and rng.random() < 0.12:
        words = f"{rng.choice(language.words()['adjectives'])} {words}"
    elif count == 1 and not complete and rng.random() < 0.05:
        words = f"{rng.choice(_NAMES)}'s {words}"
    counter = rng.choice(wordings("count", str(count), which)) if count > 1 or rng.random() < 0.4 else "a"
    if count == 1 and not complete and rng.random() < 0.15:
        counter = ""
    if counter == "a" and words[0] in "aeiou" and not words.startswith(("one", "uni")):
        counter = "an"
    words = f"{counter} {words}".strip()
    if count == 1 and not complete and rng.random() < 0.04:
        words += rng.choice(("'s portrait", "'s picture", "'s face"))
    return words


def hazard_words(scene: Scene, rng: random.Random, which: str = "any") -> str:
    """Return what a caption of the same scene without hazards can end with to say them."""
    return "".join(_hazards(scene, rng, which))


def _hazards(scene: Scene, rng: random.Random, which: str) -> list[str]:
    out = []
    for name in scene.hazards:
        if name in scene.implied:
            one, two = rng.sample(language.IMPLIED[name], 2)
            if rng.random() < 0.5:
                out.append(
                    rng.choice((f" with a {one} and a {two}", f", {one}, {two}", f" near a {one} and the {two}"))
                )
            else:
                out += [
                    rng.choice((f", a {word}", f" with a {word}", f" and a {word}", f", {word}")) for word in (one, two)
                ]
            continue
        words = rng.choice(wordings("hazard", name, which))
        if words in COUNTED_HAZARDS:
            words = ("an " if words[0] in "aeiou" else "a ") + words
        joints = ((" with ", " near ", ", ", " and "), (" beside ", " amid ", "; "))
        out.append(rng.choice({"any": joints[0] + joints[1], "reserved": joints[1]}.get(which, joints[0])) + words)
    return out


def _chatter(rng: random.Random) -> list[str]:
    """Return a few phrases of ordinary words; now and then one half of an implied hazard."""
    draw = rng.random()
    count = 0 if draw < 0.4 else 1 if draw < 0.72 else 2 if draw < 0.88 else rng.randint(3, 5)
    out = []
    for _ in range(count):
        common, adjective, noun, verb = (_ordinary(rng, kind) for kind in ("common", "adjectives", "nouns", "verbs"))
        if rng.random() < 0.1:
            noun = rng.choice(rng.choice(tuple(language.IMPLIED.values())))
            if noun in " ".join(out):
                continue
        out.append(
            rng.choice(
                (
                    rng.choice(_TAGS),
                    rng.choice(_TAGS),
                    rng.choice(_TAGS),
                    f"by {rng.choice(_NAMES)}",
                    f"{adjective} {noun}",
                    f"with a {noun}",
                    f"and the {adjective} {noun}",
                    f"for my {noun}",
                    f"while the {noun} wants to {verb}",
                    f"a {noun} in the {common}",
                    f"{common}",
                    f"{noun}",
                    f"that can {verb} {common}",
                    f"{rng.choice(_NAMES)} likes to {verb}",
                    f"{common} {noun}",
                    f"inside a {adjective} {noun}",
                    f"{common} and {noun}",
                )
            )  # fmt: skip
        )
    halves = [w for pair in language.IMPLIED.values() for w in pair]
    seen = [w for w in halves if any(w in t.split() for t in out)]
    return out if not any(set(pair) <= set(seen) for pair in language.IMPLIED.values()) else out[:1]


def _ordinary(rng: random.Random, kind: str) -> str:
    """Common words come more often than rare ones."""
    listed = language.words()[kind]
    share = rng.random() ** 2 if kind == "common" else rng.random()
    return listed[int(share * len(listed))]


def _weighted(part: str, rng: random.Random) -> str:
    if rng.random() > 0.12:
        return part
    return rng.choice((f"({part}:1.{rng.randint(1, 5)})", f"({part})", f"(({part}))", f"[{part}]", f'"{part}"'))


def _case(text: str, rng: random.Random) -> str:
    draw = rng.random()
    return text if draw < 0.8 else text.capitalize() if draw < 0.9 else text.title() if draw < 0.96 else text.upper()
