"""Full-sentence captions for closed-form erasure on real models: a concept must be caught where people use it.

A bare "a photo of X" is not enough: a causal text encoder carries X on to every later position, so an edit fitted on
one short template leaves X standing in real captions.
"""

from __future__ import annotations

import itertools
import re

from .phrases import plural

_SCENES = (
    "in a quiet garden in the morning",
    "on a wooden table by the window",
    "beside a river under a cloudy sky",
    "in a busy street at night",
    "on a plain white background",
    "in front of an old stone wall",
    "in a dark room lit by candles",
    "near the sea at sunset",
)
_SUBJECTS = (
    "a dog", "two children", "a red car", "an old house", "a bowl of fruit", "a woman with a hat", "a sailing boat",
    "a mountain village", "a cup of coffee", "a bridge", "a black cat", "a market stall", "a bicycle", "a flower field",
    "a man reading a book", "a horse", "a train station", "a bookshelf",
)  # fmt: skip
_MEDIA = (
    "a photo of",
    "a painting of",
    "a pencil drawing of",
    "a close-up of",
    "a poster showing",
    "a cinematic shot of",
)

TEMPLATES: tuple[str, ...] = (
    *(f"{medium} {{}} {scene}" for medium, scene in zip(itertools.cycle(_MEDIA), _SCENES * 3, strict=False)),
    "{}",
    "a photo of {}",
    "an image of {}, highly detailed",
    "{} and a dog playing together in the park",
    "a small {} standing next to a large tree",
    "{}, digital art, soft light, trending",
    "a portrait of {} in bright colours",
    "many {} seen from far away",
    *(f"{subject} in the style of {{}}" for subject in _SUBJECTS[:6]),
    "a painting by {} of a mountain village",
    "artwork in {} style, rich texture",
)

# Common things and ways to draw, so that what is kept is more than a few scenes: each noun stands in at least one of
# the captions to preserve. None of them is chosen with a model or an evaluation in mind.
_NOUNS = """
 dog cat horse bird fish cow sheep lion tiger elephant bear monkey snake frog butterfly bee spider whale shark duck owl
 man woman child soldier doctor farmer dancer wizard knight pirate astronaut clown king queen angel dragon monster doll
 house castle church bridge tower barn tent temple skyscraper street village city harbour garden room kitchen
 car bus train bicycle motorcycle truck boat ship airplane helicopter rocket balloon
 tree rose leaf mushroom cactus forest mountain river lake waterfall island cloud rainbow lightning fire snow sun planet
 apple banana cake bread pizza cheese egg coffee tea bottle cup glass spoon plate
 chair table bed lamp clock mirror window door book letter map key umbrella bag shoe hat dress mask crown sword shield
 guitar piano drum violin camera telephone computer television hammer wheel flag coin statue fountain fence
""".split()  # fmt: skip
_WAYS = (
    "watercolor", "oil painting", "pencil drawing", "charcoal drawing", "ink drawing", "pixel art", "stained glass",
    "embroidery", "woodcut", "cartoon", "anime", "photograph", "black and white photo", "pastel", "abstract painting",
    "cubist painting", "impressionist painting", "minimalist poster", "pop art", "graffiti", "low poly render",
    "3d render", "collage", "origami", "clay figure", "comic", "vintage poster", "blueprint", "engraving", "fresco",
)  # fmt: skip
_LOOKS = ("red", "blue", "green", "white", "black", "old", "small", "huge", "broken", "shiny", "wooden", "yellow")
_THINGS = (
    "a photo of a {n}",
    "{w}, {n}",
    "a {c} {n}",
    "{n} and {m}, {w}",
    "a {n} next to a {m}",
    "{c} {n}, {w}, detailed",
    "a {w} of a {c} {n}",
    "an image of a {n} in {w} style",
)


def _things() -> tuple[str, ...]:
    found = []
    for i, noun in enumerate(_NOUNS):
        form = _THINGS[i % len(_THINGS)]
        other, way, look = (words[(i * 7 + 3) % len(words)] for words in (_NOUNS, _WAYS, _LOOKS))
        found.append(form.format(n=noun, m=other, w=way, c=look))
    return tuple(found)


PRESERVE: tuple[str, ...] = (
    "",
    *_things(),
    *(
        f"{_MEDIA[i % len(_MEDIA)]} {subject} {_SCENES[(i * 3 + j * 5) % len(_SCENES)]}"
        for i, subject in enumerate(_SUBJECTS)
        for j in range(6)
    ),
    "a portrait of a smiling man with a beard, oil on canvas",
    "an impressionist landscape with soft brush strokes",
    "a cubist still life in muted colours",
    "a cartoon character waving, flat colours",
    "black and white photograph of a city skyline",
    "a futuristic machine in a laboratory, concept art",
    "an astronaut riding a horse on the moon",
    "a bird flying over a frozen lake, watercolour",
    "a plate of food, top view, studio light",
    "a sign with words on it in a shop window",
    "a large animal walking through tall grass",
    "the face of an old woman, dramatic light",
)

# How people write who do not write sentences: lists, capitals, plurals, possessives, weights, long prompts with the
# concept at either end, several things at once. {} is the phrase, {Up}, {s} and {'s} its forms. A detector is fitted on
# the first list and tried on the second, which shares no wording with it.
FREE: tuple[str, ...] = (
    "{}",
    "{Up}",
    "{s}",
    "{}, soft light, detailed",
    "masterpiece, best quality, {}, forest, morning mist",
    "wide shot, rainy street, reflections, {}",
    "({}:1.2), plain background",
    "three {s} in a row",
    "the {'s} house on the hill",
    "a dog, a bicycle and a {}",
    "{} and a cat, side by side, flat colours",
    "Poster: {Up}, bold letters",
    "an old photograph of a quiet harbour with many small boats and fishing nets, gulls in the air, far away a {}",
    "a {} stands at the edge of a wide field under a heavy sky while a train passes on the bridge behind it",
    "red {}, blue sky",
    "{} style, 4k",
)
FREE_KEPT_OUT: tuple[str, ...] = (
    "{} please",
    "{Up}!",
    "some {s}",
    "{}; simple; clean lines",
    "award winning, sharp focus, {}, lake, evening",
    "close up, snow, window light, {}",
    "[{}], ((studio)), no text",
    "a crowd of {s} seen from above",
    "the {'s} shadow on a wall",
    "a horse next to a {} next to a chair",
    "cups, plates, {}, spoons",
    "Draw me a {Up} in the rain",
    "a narrow lane between brick houses late in the evening, lamps, puddles, a man with an umbrella, and a {}",
    "one {} waits in front of the theatre as people with coats and hats walk past and the snow begins to fall",
    "{} wearing sunglasses",
    "something like a {}, but small",
    "a big {} on a small island",
    "make it {}",
    "green {} at noon",
    "{} by the lake, watercolor",
)
# What stands in the same places in prompts that do not name the concept.
OTHERS: tuple[str, ...] = (
    "dog", "bicycle", "house", "mountain", "flower", "portrait", "cup", "horse", "circle", "cloud", "old man", "car",
    "queen", "machine", "mask", "painting", "insect", "statue",
)  # fmt: skip
OTHERS_KEPT_OUT: tuple[str, ...] = (
    "boat", "lamp", "tree", "chair", "bird", "guitar", "clock", "apple", "tower", "young woman", "fish", "toy",
    "square", "soldier", "robe", "drawing", "cat",
)  # fmt: skip
_FORM = re.compile(r"\{(|Up|s|'s)\}")


def filled(template: str, phrase: str) -> str:
    """A caption of FREE or FREE_KEPT_OUT with a phrase in its place; "" leaves the place out.

    >>> filled("three {s} and the {'s} {Up}", "tin man")
    "three tin men and the tin man's Tin Man"
    """
    forms = {"": phrase, "Up": phrase.title(), "s": plural(phrase), "'s": f"{phrase}'s"}
    text = _FORM.sub(lambda found: forms[found[1]] if phrase else "", template)
    return re.sub(r"\s+", " ", text).strip()
