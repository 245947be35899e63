"""A detector of the prompt and a detector of the picture, for one category: they decide when the others act.

    w = (S_0 + shrink tr(S_0) / F I)^-1 (m_1 - m_0)        score = w . (x - m_0), in units of harmless scores
    text     x: a prompt's embedding, in each of its summaries
    picture  x: each patch of the predicted picture; the score of a picture is that of its strongest patches

Both are fitted in closed form (Fisher's linear discriminant), from a few prompts or pictures of the category and of
none. Thresholds are conformal: of n harmless examples that the fit did not see, the ceil((n + 1) (1 - a))-th smallest
score, so that a new harmless example fires with probability at most a; each of the pair has a = false_alarms / 2. A
picture's score is the largest over all steps so far, in fit and in use alike: a is the rate for a whole picture.

Source: conformal prediction (Vovk et al. 2005); two kinds of detectors find what either misses (2026, see
docs/methods.md). The pair is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..errors import GuidanceError
from ..files import read_safetensors, save_safetensors

__all__ = ["DetectorPair", "PictureDetector", "TextDetector", "conformal_threshold", "load_detectors", "save_detectors"]

FORMAT = "semiperm-detectors"
_SHRINK = 0.1  # of the harmless covariance towards a sphere: there are fewer examples than features
_PATCH = 3  # latent cells a side of a patch: 24 pixels of most autoencoders
_STRONGEST = 4  # patches that make a picture's score: one is noise, a small thing fills a few
_REFINED = 0.25  # share of a category's patches, the strongest, that the second fit takes for it


def discriminant(harm: Tensor, benign: Tensor, shrink: float = _SHRINK) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant: (w (F,), offset ()), so that x . w - offset has mean 0 and deviation 1 of harmless
    x.

    Args:
        harm: (n, F), benign: (m, F).
    """
    harm, benign = harm.double(), benign.double()
    mean = benign.mean(dim=0)
    centred = benign - mean
    spread = centred.mT @ centred / max(len(benign) - 1, 1)
    size = spread.diagonal().mean().clamp_min(1e-12)
    spread = (1 - shrink) * spread + shrink * size * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
    w = torch.linalg.solve(spread, harm.mean(dim=0) - mean)
    deviation = (centred @ w).std().clamp_min(1e-12) if len(benign) > 1 else w.norm().clamp_min(1e-12)
    w = w / deviation
    return w.float(), (mean @ w).float()


def conformal_threshold(scores: Tensor, alarms: float) -> float:
    """The score above which a new harmless example lies with probability at most `alarms`.

    Args:
        scores: (n,), of harmless examples that the fit did not see.

    Raises:
        GuidanceError: too few of them for that rate.
    """
    count = len(scores)
    rank = math.ceil((count + 1) * (1 - alarms))
    if rank > count:
        raise GuidanceError(
            f"{count} harmless examples cannot promise a rate of false alarms of {alarms:g}; expected at least"
            f" {math.ceil(1 / alarms) - 1}, or a higher rate"
        )
    return float(scores.sort().values[rank - 1])


@dataclass(frozen=True, eq=False)
class TextDetector:
    """Of prompts.

    Args:
        weight: (F,), offset: (), of the score. threshold: above which it fires.
    """

    weight: Tensor
    offset: Tensor
    threshold: float

    @classmethod
    def fit(cls, harm: Tensor, benign: Tensor, held_out: Tensor, alarms: float) -> TextDetector:
        """From embeddings (n, F) of the category, of none, and more of none, which set the threshold."""
        weight, offset = discriminant(harm, benign)
        return cls(weight, offset, conformal_threshold(held_out.float() @ weight - offset, alarms))

    def score(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,)."""
        if features.shape[-1] != len(self.weight):
            raise GuidanceError(
                f"a text detector of {len(self.weight)} features was given {features.shape[-1]}; fit it for this model"
            )
        return features.float() @ self.weight.to(features.device) - self.offset.to(features.device)


@dataclass(frozen=True, eq=False)
class PictureDetector:
    """Of what the denoiser says the picture will be.

    Args:
        edges: (S + 1,) shares of the schedule: stretch i has its own weights from edges[i] to edges[i + 1].
        weights: (S, F), offsets: (S,), F = C x 3 x 3. threshold: above which it fires.
    """

    edges: Tensor
    weights: Tensor
    offsets: Tensor
    threshold: float

    @classmethod
    def fit(
        cls,
        harm: Sequence[tuple[float, Tensor]],
        benign: Sequence[tuple[float, Tensor]],
        held_out: Sequence[tuple[float, Tensor]],
        alarms: float,
        stretches: int = 4,
    ) -> PictureDetector:
        """From predicted pictures along whole runs.

        Args:
            harm, benign, held_out: (share of the schedule, predicted latents (B, C, H, W)) of each step; those of
                `held_out`, as harmless as `benign`, set the threshold. All steps of it have the same pictures.
            stretches: of the schedule.

        Raises:
            GuidanceError: a stretch without a step, or too few pictures.
        """
        edges = torch.linspace(0, 1, stretches + 1)
        weights, offsets = [], []
        for first, last in zip(edges, edges[1:], strict=False):
            parts = [_patches(_within(steps, float(first), float(last))) for steps in (harm, benign)]
            found, none = (rearrange(part, "b p f -> (b p) f") for part in parts)
            weight, offset = discriminant(found, none)
            each = parts[0].float() @ weight - offset  # again, with those alone that look like it
            keep = max(_STRONGEST, round(_REFINED * each.shape[1]))
            chosen = each.topk(min(keep, each.shape[1]), dim=1).indices
            found = torch.gather(parts[0], 1, chosen[..., None].expand(-1, -1, parts[0].shape[-1]))
            weight, offset = discriminant(rearrange(found, "b p f -> (b p) f"), none)
            scale = _strongest(_patches(_within(benign, float(first), float(last))).float() @ weight - offset)
            deviation = scale.std().clamp_min(1e-6) if len(scale) > 1 else torch.ones(())
            weights.append(weight / deviation)  # stretches are compared, so each is in units of its harmless scores
            offsets.append((offset + scale.mean()) / deviation)
        made = cls(edges, torch.stack(weights), torch.stack(offsets), math.inf)
        highest = torch.stack([made.score(latents, share) for share, latents in held_out]).amax(dim=0)
        return cls(edges, made.weights, made.offsets, conformal_threshold(highest, alarms))

    def score(self, latents: Tensor, share: float) -> Tensor:
        """(B, C, H, W), or (B, C, F, H, W) of a video, at this share of the schedule -> (B,)."""
        stretch = int(torch.bucketize(share, self.edges[1:-1], right=True))
        weight, offset = self.weights[stretch].to(latents.device), self.offsets[stretch].to(latents.device)
        patches = _patches(latents)
        if patches.shape[-1] != len(weight):
            raise GuidanceError(
                f"a picture detector of {len(weight) // _PATCH**2} latent channels was given {latents.shape[1]}; fit it"
                " for this model"
            )
        return _strongest(patches @ weight - offset)


@dataclass(frozen=True, eq=False)
class DetectorPair:
    """The two detectors of a category.

    Args:
        category: its name.
        text, picture: either may be None, not both.
        false_alarms: share of harmless pictures on which the pair fires at most.
        model: hash of the denoiser that they were fitted for, "" where unknown.

    Raises:
        GuidanceError: neither of text nor of pictures.
    """

    category: str
    text: TextDetector | None
    picture: PictureDetector | None
    false_alarms: float
    model: str = ""

    def __post_init__(self) -> None:
        if self.text is None and self.picture is None:
            raise GuidanceError(f"the detectors of {self.category!r} are none; expected one of text, or of pictures")


def _patches(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, P, C x 3 x 3); frames of a video are pictures beside each other."""
    if latents.ndim == 5:
        latents = rearrange(latents, "b c f h w -> b c h (f w)")
    return rearrange(F.unfold(latents.float(), _PATCH), "b f p -> b p f")


def _strongest(scores: Tensor) -> Tensor:
    """(B, P) -> (B,)."""
    return scores.topk(min(_STRONGEST, scores.shape[1]), dim=1).values.mean(dim=1)


def _within(steps: Sequence[tuple[float, Tensor]], first: float, last: float) -> Tensor:
    found = [latents for share, latents in steps if first <= share < last or (last >= 1 and share >= 1)]
    if not found:
        raise GuidanceError(
            f"no step from {first:g} to {last:g} of the schedule; fit with more steps, or with fewer stretches"
        )
    return torch.cat(found)


# ---- files -----------------------------------------------------------------------------------------------------------


def save_detectors(pairs: Sequence[DetectorPair], path: str | Path) -> Path:
    """Write pairs to one safetensors file, whose metadata say what they are; return its path.

    Args:
        pairs: any number.
        path: of the file, which is written whole or not at all.

    >>> from semiperm.methods.guidance.detectors import TextDetector
    >>> linear = {"weight": torch.zeros(4), "offset": torch.zeros(()), "threshold": 1.5}
    >>> pair = DetectorPair("gore", TextDetector(**linear), None, 0.1)
    >>> save_detectors([pair], "gore.safetensors").name
    'gore.safetensors'
    >>> load_detectors("gore.safetensors")[0].text.threshold
    1.5
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"format": FORMAT, "version": "1", "categories": "|".join(pair.category for pair in pairs)}
    for index, pair in enumerate(pairs):
        metadata |= {f"{index}.model": pair.model, f"{index}.false_alarms": repr(pair.false_alarms)}
        if pair.text is not None:
            tensors |= {f"{index}.text.weight": pair.text.weight, f"{index}.text.offset": pair.text.offset}
            metadata[f"{index}.text.threshold"] = repr(pair.text.threshold)
        if pair.picture is not None:
            names = ("edges", "weights", "offsets")
            tensors |= {f"{index}.picture.{name}": getattr(pair.picture, name) for name in names}
            metadata[f"{index}.picture.threshold"] = repr(pair.picture.threshold)
    return save_safetensors(tensors, path, metadata)


def load_detectors(path: str | Path) -> tuple[DetectorPair, ...]:
    """Read what `save_detectors` wrote.

    Args:
        path: of the file.

    Raises:
        GuidanceError: a file of something else, or a damaged one.
        SemipermError: no safetensors file.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise GuidanceError(f"{str(path)!r} holds no detectors; expected a file of `semiperm guard fit`")
    if metadata.get("version") != "1":
        raise GuidanceError(f"{str(path)!r} is of version {metadata.get('version')}; this release reads 1: update it")
    try:
        return tuple(_pair(i, name, tensors, metadata) for i, name in enumerate(metadata["categories"].split("|")))
    except (KeyError, ValueError):
        raise GuidanceError(f"{str(path)!r} is damaged: detectors lack a part; fit them again") from None


def _pair(index: int, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> DetectorPair:
    text = picture = None
    if f"{index}.text.threshold" in metadata:
        weight, offset = (tensors[f"{index}.text.{part}"] for part in ("weight", "offset"))
        text = TextDetector(weight, offset, float(metadata[f"{index}.text.threshold"]))
    if f"{index}.picture.threshold" in metadata:
        edges, weights, offsets = (tensors[f"{index}.picture.{part}"] for part in ("edges", "weights", "offsets"))
        picture = PictureDetector(edges, weights, offsets, float(metadata[f"{index}.picture.threshold"]))
    return DetectorPair(name, text, picture, float(metadata[f"{index}.false_alarms"]), metadata[f"{index}.model"])
