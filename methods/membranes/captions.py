"""Full-sentence captions for closed-form erasure on real models: a concept must be caught where people use it.

A bare "a photo of X" is not enough: a causal text encoder carries X on to every later position, so an edit fitted on
one short template leaves X standing in real captions.
"""

from __future__ import annotations

import itertools

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

PRESERVE: tuple[str, ...] = (
    "",
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
