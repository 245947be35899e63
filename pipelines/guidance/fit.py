"""Fit the pair of detectors of a category on a pipeline: from prompts, whose pictures it draws, and from pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ...methods.errors import GuidanceError
from ...methods.guidance.category import Category, as_categories, is_one
from ...methods.guidance.config import SafeGuidanceConfig
from ...methods.guidance.detectors import DetectorPair, PictureDetector, TextDetector
from ...methods.guidance.examples import halves, harmless, in_sentences
from ...methods.guidance.summaries import summaries
from ...methods.membranes.base_model import base_model_hash
from ..family import Pipeline, denoiser_of
from ..text import encode_text, segments_of
from .apply import SafeGuidanceHandle
from .root import Root
from .run import GuidanceCall, GuidanceRun

__all__ = ["fit_detectors"]


@overload
def fit_detectors(pipe: Pipeline, category: str | Path | Category, **given: Any) -> DetectorPair: ...


@overload
def fit_detectors(
    pipe: Pipeline, category: Sequence[str | Path | Category], **given: Any
) -> tuple[DetectorPair, ...]: ...


def fit_detectors(
    pipe: Pipeline,
    category: str | Path | Category | Sequence[str | Path | Category],
    *,
    prompts: Sequence[str] | None = None,
    benign: Sequence[str] | None = None,
    pictures: bool = True,
    steps: int = 20,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **sampling: Any,
) -> DetectorPair | tuple[DetectorPair, ...]:
    """Fit a text and a picture detector of each category, in closed form, with thresholds for a stated rate of false
    alarms. Several categories share the harmless pictures, which are drawn once.

    Half of the harmless prompts are fitted on, the other half sets the thresholds; each detector of the pair gets half
    of the category's `false_alarms`. The picture detector is fitted on what the denoiser predicts along runs of the
    pipeline.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3 or Flux pipeline.
        category: its name, .toml file, or the `Category`; one or several.
        prompts: that show it, of one category; None takes its phrases, by themselves and in sentences.
        benign: harmless prompts, at least 4 / false_alarms of them for the promise to hold; None takes ours, as many as
            the lowest rate wants.
        pictures: whether a picture detector is fitted, too; without, nothing is drawn.
        steps: of each run.
        batch_size: pictures at a time.
        seed: of the first picture.
        progress: called with the number of pictures that were drawn.
        sampling: what else the pipeline's call gets.

    Returns:
        The pair, or a tuple of them for several; `save_detectors` writes them.

    Raises:
        GuidanceError: too few harmless prompts for the rate, or prompts of more than one category.

    >>> own = Category("signs", ("a warning sign",), false_alarms=0.4)
    >>> pair = fit_detectors(pipe, own, benign=[f"a star, {i} times" for i in range(12)], pictures=False)
    >>> pair.text.weight.shape
    torch.Size([128])
    """
    chosen = as_categories(category)
    if prompts is not None and len(chosen) > 1:
        raise GuidanceError(
            f"prompts of {len(chosen)} categories; expected those of one: fit each by itself, or leave prompts out"
        )
    share = 2 if pictures else 1  # of the pair, each fires at as many
    said = [phrase for one in chosen for phrase in one.phrases]
    benign = harmless(benign, min(one.false_alarms for one in chosen) / share, said)
    segments = segments_of(pipe)
    denoiser, _ = denoiser_of(pipe)
    model = base_model_hash({name: value for name, value in denoiser.state_dict().items() if value.ndim == 2})

    def read(texts: Sequence[str]) -> Tensor:
        return summaries(encode_text(pipe, texts).hidden, texts, segments).cpu()

    def predicted(texts: Sequence[str], part: int) -> list[tuple[float, Tensor]]:
        return _predicted(pipe, chosen[0], texts, steps, batch_size, seed + 10_000 * part, progress, sampling)

    calm = halves(benign)
    words = [read(texts) for texts in calm]
    runs = [predicted(texts, part) for part, texts in enumerate(calm, 1)] if pictures else []
    pairs = []
    for one in chosen:
        harm, alarms = in_sentences(one.phrases) if prompts is None else list(prompts), one.false_alarms / share
        text = TextDetector.fit(read(harm), words[0], words[1], alarms)
        picture = None
        if pictures:
            picture = PictureDetector.fit(predicted(harm, 0), runs[0], runs[1], alarms)
        pairs.append(DetectorPair(one.name, text, picture, one.false_alarms, model))
    return pairs[0] if is_one(category) else tuple(pairs)


class _Watching(SafeGuidanceHandle):
    """A handle that changes nothing and keeps what the denoiser predicts."""

    def __init__(self, pipe: Pipeline, category: Category):
        super().__init__(pipe, SafeGuidanceConfig(category, "safree"))
        self.root: Any = _WatchingRoot(self)
        self.methods = frozenset()  # it looks on


class _WatchingRoot(Root):
    """Keeps (share, predicted latents) of each step."""

    def __init__(self, handle: SafeGuidanceHandle):
        super().__init__(handle)
        self.seen: list[tuple[float, Tensor]] = []

    def _edits(self, run: GuidanceRun, call: GuidanceCall) -> list[tuple[int, int]]:
        return []

    def _look(self, run: GuidanceRun, call: GuidanceCall, prediction: Tensor) -> None:
        self.seen.append((call.share, self.predicted(call, prediction).float().cpu()))


def _predicted(
    pipe: Pipeline,
    category: Category,
    prompts: Sequence[str],
    steps: int,
    batch_size: int,
    seed: int,
    progress: Callable[[int], None] | None,
    sampling: dict,
) -> list[tuple[float, Tensor]]:
    """(share, predicted latents of all prompts) of each step."""
    by_step: dict[float, list[Tensor]] = {}
    before = SafeGuidanceHandle.on(pipe)
    handle = _Watching(pipe, category)
    handle.replace(pipe)
    try:
        for first in range(0, len(prompts), batch_size):
            part = list(prompts[first : first + batch_size])
            generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
            handle.root.seen.clear()
            pipe(part, num_inference_steps=steps, generator=generators, output_type="latent", **sampling)
            for share, latents in handle.root.seen:
                by_step.setdefault(round(share, 6), []).append(latents)
            if progress is not None:
                progress(len(part))
    finally:
        handle.remove()
        if before is not None:
            before.install()
    return [(share, torch.cat(latents)) for share, latents in sorted(by_step.items())]
