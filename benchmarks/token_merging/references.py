"""Negative token merging on references that its setting was not chosen on: one row a reference, however it comes out.

The setting is chosen by a rule that wants no truth, and that a user of any checkpoint can follow: take one reference
picture of your own (here the mascot) and some prompts that show it, go up the ladder from mild to strong, and stop at
the first setting with which the pictures are half as similar to the reference as without (mean cosine of any image
embedding, less its mean over unrelated pictures). That setting is then used, unchanged, on four references which it has
not seen: plain pictures of things that the prompts name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ...canvas.editions import world_of
from ...canvas.world import World
from ...methods.errors import SemipermError
from .look import BATCH, MASCOT, Look, Prompts

_ALIKE = 0.1  # mean cosine, of unrelated pictures about 0 with a spread of .1 over a few dozen
HELD_OUT = ("ghost", "robot", "star", "flower")
# From the paper's setting up: all tokens instead of the alike ones, longer, stronger.
LADDER = (
    {"strength": 0.9, "threshold": 0.65, "end": 0.2},
    {"strength": 0.9, "threshold": -1.0, "end": 0.2},
    {"strength": 0.9, "threshold": -1.0, "end": 0.4},
    {"strength": 1.5, "threshold": -1.0, "end": 0.6},
    {"strength": 2.2, "threshold": -1.0, "end": 0.6},
    {"strength": 3.0, "threshold": -1.0, "end": 0.6},
)


def asked_of(world: World, prompts: int = 24) -> tuple[Prompts, dict[str, Prompts]]:
    """The mascot by its synonyms to calibrate, and four things by their names; every look in turn."""
    every = list(itertools.product(world.names("style"), world.names("background")))
    some = [every[i * len(every) // prompts] for i in range(prompts)]
    synonyms = world.phrases(MASCOT)[1:]
    mascot = [(f"a {synonyms[i % len(synonyms)]} in {s} style on {b}", s, b) for i, (s, b) in enumerate(some)]
    return mascot, {name: [(f"{world.mention(name)} in {s} style on {b}", s, b) for s, b in some] for name in HELD_OUT}


def batches(prompts: int = 24) -> int:
    """How many batches `run` makes at most."""
    return -(-prompts // BATCH) * (1 + len(LADDER) + 4 * len(HELD_OUT))


def run(
    name: str = "canvas",
    prompts: int = 24,
    steps: int | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """Choose the setting by the rule, and judge it on the held-out references.

    Args:
        name: of an embedded model. prompts: of each reference. steps: of denoising; None takes the model's own.
        progress: called with 1 after every batch of pictures.

    Returns:
        Rows {"name": method, "reference", "role": "calibration" or "held out", "judge", "images", "shown": pictures in
        which the judge sees the reference's thing, "similarity", "style_kept", "background_kept", "config", "world",
        "steps", "guidance_scale", "machine", "versions"}; shares are [value, low, high] with 95 % intervals. Without
        guidance there is no negative prompt beside it.
    """
    world = world_of(name)
    look = Look(world, steps, progress)
    calibration, held_out = asked_of(world, prompts)
    rows, setting = choose(look, calibration)
    for thing, asked in held_out.items():
        words = world.mention(thing)
        for method, options, call in (
            ("untouched", None, {}),
            ("negative prompt", None, {"negative_prompt": words}),
            ("negative_token_merging", setting, {}),
            ("negative_token_merging, reference named", setting | {"reference_prompt": words}, {}),
        ):
            if call and not look.guided:
                continue
            rows += [row | {"role": "held out"} for row in look.away(method, thing, asked, options, **call)]
    return [row | look.about() for row in rows]


def choose(look: Look, asked: Prompts) -> tuple[list[dict], dict]:
    """The rows of the ladder as far as it was climbed, and the setting: the first that halves the similarity, as the
    first judge's features have it.

    Raises:
        SemipermError: the features do not see the reference in pictures of it, so that there is nothing to halve.
    """
    bare = look.away("untouched", MASCOT, asked, None)
    if not bare[0]["similarity"] > _ALIKE:
        raise SemipermError(
            f"pictures that ask for the reference are no more like it than others (similarity"
            f" {bare[0]['similarity']:.3f}, expected above {_ALIKE}); take another embedding, or prompts that show it"
        )
    found = list(bare)
    for options in LADDER:
        some = look.away("negative_token_merging", MASCOT, asked, options)
        found += some
        if some[0]["similarity"] <= bare[0]["similarity"] / 2:
            break
    return [row | {"role": "calibration"} for row in found], options
