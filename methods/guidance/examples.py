"""Harmless prompts, and a category's phrases in sentences: what text detectors are fitted from, in every face."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import GuidanceError
from ..membranes.phrases import fold, names
from .detectors import UNASKED, TextDetector, fewest

__all__ = ["BENIGN", "fit_text_detector", "halves", "harmless", "in_sentences"]

_SUBJECTS = (
    "a fox", "a bowl of fruit", "an old lighthouse", "two children reading", "a mountain lake", "a red bicycle",
    "a kitchen table", "a market street", "a sleeping cat", "a sailing boat", "a field of wheat", "a stone bridge",
    "a violinist", "a wooden chair", "a city at dusk", "a glass of water", "a football match", "a snowy forest",
    "a robot", "a portrait of a woman", "a portrait of a man", "a horse", "a train station", "a bouquet of tulips",
)  # fmt: skip
_MANNERS = ("{}", "a photo of {}", "a painting of {}", "{} in the morning light", "a drawing of {}", "{}, close up")
BENIGN = tuple(manner.format(subject) for manner in _MANNERS for subject in _SUBJECTS)


def in_sentences(phrases: Sequence[str]) -> list[str]:
    """Phrases by themselves, in each manner, and beside harmless subjects."""
    plain = [manner.format(phrase) for phrase in phrases for manner in _MANNERS]
    beside = [f"{subject} with {phrase}" for phrase in phrases for subject in _SUBJECTS[:4]]
    return list(dict.fromkeys(plain + beside))


def harmless(given: Sequence[str] | None, alarms: float, without: Sequence[str]) -> list[str]:
    """Harmless prompts to fit from: those given, or as many of ours as this rate of false alarms wants, and some spare
    ones, since pictures may show the category unasked.

    Args:
        alarms: of one detector. without: the categories' phrases, which ours must not name.

    Raises:
        GuidanceError: there are not so many of ours.
    """
    if given is not None:
        return list(given)
    phrases, wanted = [fold(phrase) for phrase in without], 2 * fewest(alarms)
    known = [prompt for prompt in BENIGN if not names(prompt, phrases)]
    if wanted > len(known):
        raise GuidanceError(
            f"{wanted} harmless prompts are needed, and {len(known)} come with the package that do not name the"
            " category: give your own (`benign`), or a higher rate of false alarms"
        )
    return known[: math.ceil(wanted / (1 - UNASKED))]


def halves(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """One half to fit on, the other to set the threshold with: alike, though lists go from subject to subject."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    mixed, half = [prompts[i] for i in order], len(prompts) // 2
    return mixed[:half], mixed[half:]


def fit_text_detector(
    read: Callable[[Sequence[str]], Tensor], harm: Sequence[str], benign: Sequence[str], alarms: float
) -> TextDetector:
    """A text detector whose threshold holds for a stated rate of false alarms.

    Args:
        read: prompts -> (n, F). harm: prompts of the category. benign: harmless ones. alarms: the rate.

    Raises:
        GuidanceError: too few harmless prompts for the rate.
    """
    found, none = halves(benign)
    return TextDetector.fit(read(harm), read(found), read(none), alarms)
