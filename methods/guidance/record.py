"""What safe guidance did in one run, image by image: the record that both faces keep, and its seal.

A seal (HMAC-SHA256 by a key of yours) tells whether a record was changed after it was written. It detects, it does not
prevent: who can write the file can take record and seal out of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import GuidanceError
from .config import SafeGuidanceConfig

__all__ = ["CHUNK", "GuidanceRecord", "record_of_picture", "seal", "sealed_is_intact"]

CHUNK = "semiperm"  # the PNG text chunk that says how a picture was made; the record stands under "guard"
SEAL = "hmac"
_SHORTEST = 16  # bytes of a key: shorter ones are guessed


class GuidanceRecord:
    """Steps, what fired on each image, and extra model evaluations. Never waits for the GPU before `report`."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.evaluations = 0  # rows of the denoiser beside those that the pipeline asked for
        self.values: list[dict[str, list[Tensor]]] = []  # of each step: name -> (B,) of each outcome
        self.text_scores: Tensor | None = None  # (B,)
        self.refused: set[int] = set()

    def step(self, share: float, sigma: float | None, active: bool, extra_rows: int = 0) -> None:
        """One call of the denoiser; several calls at one noise level are one step."""
        self.evaluations += extra_rows
        if not self.steps or self.steps[-1]["sigma"] != sigma:
            self.steps.append({"share": share, "sigma": sigma, "active": active})
            self.values.append({})
        elif active:
            self.steps[-1]["active"] = True

    def add(self, name: str, value: Tensor) -> None:
        """One outcome of the current step for each image, (B,): "scale", "category" (-1: none), "alignment" or
        "picture_score"."""
        self.values[-1].setdefault(name, []).append(value.detach())

    def look(self, config: SafeGuidanceConfig, latents: Tensor, share: float, fired: Tensor) -> Tensor | None:
        """Let the picture detectors see what the pictures will be; they decide the steps to come.

        Args:
            config: that has picture detectors.
            latents: (B, C, H, W), as the model predicts them. share: of the schedule. fired: (B, K) bool of the
                categories, changed in place.

        Returns:
            (B,) bool: what is refused from here on; None: nothing is.

        Raises:
            GuidanceError: as `SafeGuidanceConfig.ended`.
        """
        above = torch.stack([seen.score(latents, share) - seen.threshold for _, seen in config.seeing], dim=1)
        self.add("picture_score", above.amax(dim=1))
        names = [category.name for category in config.categories]
        for (category, _), column in zip(config.seeing, (above > 0).cpu().T, strict=True):
            fired[:, names.index(category)] |= column
        ended = config.ended(above, share)
        if ended is not None:
            self.refused |= set(ended.nonzero()[:, 0].tolist())
        return ended

    @property
    def outcomes(self) -> int:
        """How often something was done."""
        return sum(len(found) for step in self.values for name, found in step.items() if name == "scale")

    def report(self, config: SafeGuidanceConfig, images: int) -> dict:
        """What was done, in the same words in every face.

        Args:
            config: what it was set to. images: how many were drawn.

        Returns:
            {"algorithms": names, "config": hash of all settings, "categories": names, "categories_hash", "strength",
            "window", "evaluations": rows of the denoiser beside those that were asked for, "rows": [{"kind":
            "positive", "image", "fired": share of the steps in which it was changed, "scale": mean scale of the change
            over them, "scales": that of each step, "category": the one that acted most, or None, "alignment":
            with a category, the highest cosine, or None where dynamic mode is off, "text_score", "picture_score": of
            the detectors (the highest), or None, "refused": whether it ended as plain grey}],
            "steps": [{"share", "sigma", "active"}]}.
        """
        return {
            "algorithms": [one.NAME for one in config.algorithms],
            "config": config.digest(),
            "categories": [category.name for category in config.categories],
            "categories_hash": config.categories_digest(),
            "strength": config.strength,
            "window": [config.start, config.end],
            "evaluations": self.evaluations,
            "rows": [self._row(config, image, images) for image in range(images)],
            "steps": list(self.steps),
        }

    def _row(self, config: SafeGuidanceConfig, image: int, images: int) -> dict:
        scales = [self._mean(step, "scale", image) for step in self.values]
        fired = [scale for scale in scales if scale > 0]
        acted = [int(v[image]) for step in self.values for v in step.get("category", ()) if len(v) == images]
        acted = [category for category in acted if category >= 0]
        scores, cosines = (
            [float(v[image]) for step in self.values for v in step.get(name, ())]
            for name in ("picture_score", "alignment")
        )
        category = max(set(acted), key=acted.count) if acted and fired else None
        return {
            "kind": "positive",
            "image": image,
            "fired": len(fired) / len(scales) if scales else 0.0,
            "scale": sum(scales) / len(scales) if scales else 0.0,
            "scales": [round(scale, 6) for scale in scales],
            "category": None if category is None else config.categories[category].name,
            "alignment": max(cosines) if cosines else None,
            "text_score": None if self.text_scores is None else float(self.text_scores[image]),
            "picture_score": max(scores) if scores else None,
            "refused": image in self.refused,
        }

    @staticmethod
    def _mean(step: dict[str, list[Tensor]], name: str, image: int) -> float:
        found = step.get(name, ())
        return float(torch.stack([v[image].float() for v in found]).mean()) if found else 0.0


def record_of_picture(reports: Sequence[dict[str, Any]], image: int, key: bytes | str | None = None) -> list[dict]:
    """What a picture's file says of its guidance: each report with that picture's row alone, sealed where there is a
    key.

    Args:
        reports: of `GuidanceRecord.report`, one for each guidance at work. image: which picture of the run.

    Raises:
        GuidanceError: no reports, or none of that picture; or a key that is too short.
    """
    found = []
    for report in reports:
        rows = [row for row in report["rows"] if row["image"] == image]
        if len(rows) != 1:
            raise GuidanceError(
                f"the guidance record is of {len(report['rows'])} pictures, and has {len(rows)} rows for picture"
                f" {image}: give the record of the run that drew these pictures"
            )
        alone = {**report, "rows": rows}
        found.append(alone if key is None else seal(alone, key))
    if not found:
        raise GuidanceError("the guidance record says nothing; connect `record` of Guidance Report")
    return found


# ---- the seal --------------------------------------------------------------------------------------------------------


def _canonical(record: dict[str, Any]) -> bytes:
    return json.dumps({k: v for k, v in record.items() if k != SEAL}, sort_keys=True, separators=(",", ":")).encode()


def _key(key: bytes | str) -> bytes:
    key = key.encode() if isinstance(key, str) else key
    if len(key) < _SHORTEST:
        raise GuidanceError(f"a key of {len(key)} bytes to seal records; expected {_SHORTEST} or more")
    return key


def seal(record: dict[str, Any], key: bytes | str) -> dict[str, Any]:
    """The record with its seal under "hmac".

    Args:
        key: a secret of at least 16 bytes.

    Raises:
        GuidanceError: a shorter key.
    """
    return {**record, SEAL: hmac.new(_key(key), _canonical(record), hashlib.sha256).hexdigest()}


def sealed_is_intact(record: dict[str, Any], key: bytes | str) -> bool:
    """Whether a record is as it was sealed.

    Raises:
        GuidanceError: it has no seal, or the key is too short.
    """
    found: Sequence[str] | str | None = record.get(SEAL)
    if not isinstance(found, str):
        raise GuidanceError('the record has no "hmac": it was never sealed, or the seal was taken out')
    return hmac.compare_digest(found, hmac.new(_key(key), _canonical(record), hashlib.sha256).hexdigest())
