"""Who takes part: the ways of the erasure benchmark, the rivals, our image side, both sides, and trained files.

Each is a `Method`: a context manager around a pipeline that is told the concepts' plain names, and yields further
arguments of the pipeline's call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ...canvas.models import MODELS
from ...methods.errors import MembraneError, ModelError
from ..erasure.methods import METHODS, Method, Told, applied
from ..rivals import RIVALS

__all__ = ["LEFT_OUT", "contestants"]

_TWICE = "another gate of the same membranes, or among the rivals as well"
_LONG = "trained for many minutes for each concept"
_DRAWN = "its detectors are fitted from 150 pictures for each concept"
# why a quick run leaves a method out where none is named
LEFT_OUT = dict.fromkeys(("closed_form/always", "closed_form/paper", "uce/textbook"), _TWICE)
LEFT_OUT |= dict.fromkeys(("spm", "advunlearn", "esd_x", "esd_u"), _LONG)
LEFT_OUT |= {"membranes/refusing": _DRAWN}
SIDES = {"membranes/image": "image", "membranes/both": "both"}  # the text side alone is closed_form/auto


def contestants(guided: bool, files: Mapping[str, Callable[[Any], Any]] | None = None) -> dict[str, Method]:
    """Every method by its name, in the order of the tables.

    Args:
        guided: whether the model is guided; without, a negative prompt has nothing to act on, and says so.
        files: name -> what loads trained membranes for a pipeline.
    """
    sides: dict[str, Method] = {name: partial(_side, side=side) for name, side in SIDES.items()}
    sides["membranes/refusing"] = _refusing
    trained: dict[str, Method] = {name: partial(_file, load=load) for name, load in (files or {}).items()}
    found = {**sides, **trained, **METHODS, **RIVALS}
    return found if guided else {**found, "negative_prompt": _without_guidance}


@contextmanager
def _without_guidance(pipe, told: Told) -> Iterator[dict]:
    raise ModelError("the model is sampled without guidance, so that a negative prompt has nothing to act on")
    yield {}


@contextmanager
def _side(pipe, told: Told, side: str) -> Iterator[dict]:
    from ...methods.membranes.visual_fit import VisualConfig
    from ...pipelines.membranes.erase import erase_concepts

    concepts = ["|".join(own) for own in told.words.values()]
    membranes = erase_concepts(pipe, concepts, side=side, visual=VisualConfig(sampling=_sampling(pipe)))
    with applied(pipe, membranes, "auto") as extra:
        yield extra


@contextmanager
def _refusing(pipe, told: Told) -> Iterator[dict]:
    """Membranes of both sides, and a picture in which detectors still see a concept halfway ends as plain grey."""
    from ...methods.guidance.category import Category
    from ...methods.guidance.config import SafeGuidanceConfig
    from ...pipelines.guidance.apply import apply_safe_guidance
    from ...pipelines.guidance.fit import fit_detectors

    # of each detector .02, for which our harmless prompts can vouch; words are the membranes' part
    concepts = [Category(name, tuple(own), false_alarms=0.04) for name, own in told.words.items()]
    pairs = [replace(pair, text=None) for pair in fit_detectors(pipe, concepts, **_sampling(pipe))]
    guarded = SafeGuidanceConfig(concepts, "adavd", detectors=pairs, when_unsafe="refuse")
    with _side(pipe, told, "both") as extra, apply_safe_guidance(pipe, guarded):
        yield extra


def _sampling(pipe) -> dict[str, float]:
    """How an embedded model is sampled."""
    model = MODELS.get(getattr(pipe, "semiperm_canvas", ""))
    return {"guidance_scale": model.guidance_scale} if model else {}


@contextmanager
def _file(pipe, told: Told, load: Callable[[Any], Any]) -> Iterator[dict]:
    from ...methods.membranes.types import Membranes

    stack = load(pipe)
    wanted = {phrase: name for name, own in told.words.items() for phrase in (name, *own)}
    membranes = Membranes([one for one in stack if one.concept in wanted])
    if missing := set(told.words) - {wanted[one.concept] for one in membranes}:
        raise MembraneError(f"the file erases {', '.join(stack.concepts)}, and not {', '.join(sorted(missing))}")
    with applied(pipe, membranes, "auto") as extra:
        yield extra
