"""What sampling runs of a model did, found again by the latents that they returned.

One model may serve several samplers, and ComfyUI decides which runs last: what a run did belongs to its latents.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from ..methods.errors import SemipermError

_KEPT = 64  # runs of one patched model: a report is some kilobytes, and a graph has a few samplers


class RunReports:
    """The last runs' reports.

    Args:
        error: what to raise for latents of which nothing is known.
    """

    def __init__(self, error: type[SemipermError]):
        self._error, self._kept = error, {}

    def keep(self, samples: Tensor, report: dict) -> None:
        """Remember what the run that returned these latents did; equal latents have the newest report."""
        digest = _digest(samples)
        self._kept.pop(digest, None)
        self._kept[digest] = report
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]

    def of(self, samples: Tensor) -> dict:
        """The report of the run that returned these latents; an error where no kept run did."""
        report = self._kept.get(_digest(samples))
        if report is None:
            raise self._error(
                "this latent is not what a run of this model returned, or it was changed since; a report belongs to one"
                " run: connect the LATENT of the sampler itself (of SamplerCustomAdvanced `output`) and the MODEL that"
                " this sampler has"
            )
        return report


def _digest(samples: Tensor) -> str:
    parts = samples.unbind() if getattr(samples, "is_nested", False) else [samples]  # sound beside a video
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(repr(tuple(part.shape)).encode())
        hashed.update(part.detach().float().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()
