"""How to look for marks, and what one picture says: what goes into detection (detection.py) and comes out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import WatermarkError
from .channels import ChannelWeights
from .content import Embedding, perceptual_hash
from .issued import Issued
from .ladder import LADDER
from .payload import Payload
from .reader import Reader
from .search import Search
from .views import AS_GIVEN

__all__ = ["SOON", "DetectionConfig", "DetectionResult"]

SOON = 2  # rungs that are cheap: all views are looked at so before the reader looks, and then more steps


@dataclass(frozen=True)
class DetectionResult:
    """What one picture says.

    Args:
        verdict: "valid" (mark present, payload authenticated, and the content is what was signed where it is bound),
            "content differs" (an authentic mark in a picture that shows something else: a transplant), "unverified"
            (mark present, but the payload did not decode, or its MAC is wrong, or the keyring has no MAC key, or
            content was bound in format 1, which a holder of a detector's copy can forge: treat the payload as a claim)
            or "absent".
        p_value, log10_p: the chance that a picture made without the keys looks so marked; all keys, nonces, rungs of
            the ladder and edits undone are accounted for.
        payload: None if absent or not decoded.
        bit_confidence: share of the payload field's weight that agrees with the decoded payload, about .5 without a
            mark.
        key_id, key_name: None if absent.
        model_evaluations: of the denoiser, over all rungs and edits.
        content_p_value: the chance that a picture of unrelated content fits the bound one so well; None where no
            content is bound or the payload was not authenticated.
        transform: the edit that was undone, "as given" without one.
        evidence: float32 in the latent's shape (C, h, w), positive where the mark agrees; None where nothing was
            decoded.
    """

    verdict: str
    p_value: float
    log10_p: float
    payload: Payload | None
    bit_confidence: float
    key_id: int | None
    key_name: str | None
    model_evaluations: int
    content_p_value: float | None = None
    transform: str = AS_GIVEN
    evidence: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class DetectionConfig:
    """How to look for marks, in every face.

    Args:
        false_positive_rate: at which a mark counts as present, above 0, below 1.
        ladder: inversion steps of each rung, rising; (1,) costs a single evaluation of the denoiser.
        scope: as at signing.
        batch_size: pictures in the model at a time, at least 1.
        search: edits to undo where the ladder finds nothing (flips, turns, shifts, crops); True for the usual ones,
            None or False for none.
        size: (height, width) that was signed, in pixels. None tries the picture's own and, where the inverter knows
            it, the model's; a search then divides its budget among them.
        embedding: as when the content was bound.
        reader: of the model's pictures (reader.py): one rung more, after the first two of the ladder.
        channels: how much each channel of the model's latents says (channels.py); None lets all say the same.
        issued: marks that were signed (issued.py): each rung looks for them, at half of its share of the error.

    Raises:
        WatermarkError: a value out of range.
    """

    false_positive_rate: float = 1e-6
    ladder: Sequence[int] = LADDER
    scope: str = ""
    batch_size: int = 16
    search: Search | bool | None = None
    size: tuple[int, int] | None = None
    embedding: Embedding = perceptual_hash
    reader: Reader | None = None
    channels: ChannelWeights | None = None
    issued: Sequence[Issued] = ()

    def __post_init__(self):
        if not 0 < self.false_positive_rate < 1:
            raise WatermarkError(
                f"the false positive rate is {self.false_positive_rate}; expected above 0, below 1, such as 1e-6"
            )
        ladder = tuple(self.ladder)
        if not ladder or ladder[0] < 0 or any(b <= a for a, b in zip(ladder, ladder[1:], strict=False)):
            raise WatermarkError(
                f"the ladder is {ladder}; expected rising numbers of inversion steps, such as {LADDER}"
            )
        if self.batch_size < 1:
            raise WatermarkError(f"batch_size={self.batch_size}; expected at least 1 picture at a time")
        size = None if self.size is None else tuple(self.size)
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise WatermarkError(f"the signed size is {size}; expected (height, width) in pixels")
        search = Search() if self.search is True else self.search or None
        for name, value in (("ladder", ladder), ("size", size), ("search", search), ("issued", tuple(self.issued))):
            object.__setattr__(self, name, value)

    @property
    def rungs(self) -> tuple[int | None, ...]:
        """Inversion steps of each look at a picture, None for the reader's."""
        reader = (None,) if self.reader is not None else ()
        return (*self.ladder[:SOON], *reader, *self.ladder[SOON:])

    @property
    def log10_rate(self) -> float:
        return math.log10(self.false_positive_rate)
