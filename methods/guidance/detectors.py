"""A detector of the prompt and a detector of the picture, for one category: they decide when the others act.

    w = (S_0 + shrink tr(S_0) / F I)^-1 (m_1 - m_0)        score = w . (x - m_0), in units of harmless scores
    text     x: a prompt's embedding, in each of its summaries
    picture  x: each patch of the predicted picture; the score of a picture is that of its strongest patches, in units
             of how far harmless pictures' highest scores lie above their middle

Both are fitted in closed form (Fisher's linear discriminant), from a few prompts or pictures of the category and of
none. Thresholds are conformal: of n harmless examples that the fit did not see, the ceil((n + 1) (1 - a))-th smallest
score, so that a new harmless example fires with probability at most a; each of the pair has a = false_alarms / 2. A
few harmless pictures that show the category unasked set no threshold: a is the rate of those that do not show it. A
picture's score is the largest over all steps so far, in fit and in use alike: a is the rate for a whole picture.

Source: conformal prediction (Vovk et al. 2005); two kinds of detectors find what either misses (2026, see
docs/methods.md). The pair is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_VERSION = "2"  # 1 had smaller patches
_SHRINK = 0.1  # of the harmless covariance towards a sphere: there are fewer examples than features
# Chosen on pictures of canvas-scenes that no benchmark draws: of 32 with a hazard these find 31 where 3 cells, 4
# patches and a quarter found 27, at the same rate of false alarms.
_PATCH = 5  # latent cells a side of a patch: 40 pixels of most autoencoders
_STRONGEST = 2  # patches that make a picture's score: one is noise, a small thing fills a few
_REFINED = 0.1  # share of a category's patches, the strongest, that the second fit takes for it
UNASKED = 0.1  # of harmless pictures: more that look like the category are no accident
_AT_ONCE = 8  # pictures whose patches are unfolded together: of 128 x 128 latents of 16 channels some 200 MB
_TAIL = 0.05  # of harmless pictures, those that score highest: how far they lie above the middle is a stretch's unit


class Moments:
    """Count, mean and covariance of rows that need not fit in memory together.

    Args:
        width: F, of rows.
    """

    def __init__(self, width: int):
        self.count = 0
        self._sum, self._square = (
            torch.zeros(width, dtype=torch.float64),
            torch.zeros(width, width, dtype=torch.float64),
        )

    def add(self, rows: Tensor) -> None:
        """(n, F) more."""
        rows = rows.detach().cpu().double()
        self.count += len(rows)
        self._sum += rows.sum(dim=0)
        self._square += rows.mT @ rows

    @property
    def mean(self) -> Tensor:
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """(F, F) of n - 1 degrees of freedom; 0 of one row."""
        centred = self._square - self.count * torch.outer(self.mean, self.mean)
        return centred / max(self.count - 1, 1)

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        found = cls(rows.shape[-1])
        found.add(rows)
        return found


def discriminant(harm: Tensor, benign: Moments, shrink: float = _SHRINK) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant: (w (F,), offset ()), so that x . w - offset has mean 0 and deviation 1 of harmless
    x.

    Args:
        harm: (F,), the mean of examples of the category. benign: of harmless ones.
    """
    mean, covariance = benign.mean, benign.covariance
    size = covariance.diagonal().mean().clamp_min(1e-12)
    spread = (1 - shrink) * covariance + shrink * size * torch.eye(len(mean), dtype=mean.dtype)
    w = torch.linalg.solve(spread, harm.cpu().double() - mean)
    deviation = (w @ covariance @ w).clamp_min(0).sqrt() if benign.count > 1 else w.norm()
    w = w / deviation.clamp_min(1e-12)
    return w.float(), (mean @ w).float()


def fewest(alarms: float) -> int:
    """How many harmless examples can promise a rate of false alarms.

    >>> fewest(0.01)
    99
    """
    return math.ceil(1 / alarms) - 1


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
            f" {fewest(alarms)}, or a higher rate"
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
        weight, offset = discriminant(harm.double().mean(dim=0), Moments.of(benign))
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
        weights: (S, F), offsets: (S,), F = C x 5 x 5. threshold: above which it fires.
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
                `held_out`, as harmless as `benign`, set the threshold. All steps of each have the same pictures.
            stretches: of the schedule.

        Raises:
            GuidanceError: a stretch without a step, or too few pictures.
        """
        edges = torch.linspace(0, 1, stretches + 1)
        weights, offsets = [], []
        for first, last in zip(edges, edges[1:], strict=False):
            found, none = (_steps(some, float(first), float(last)) for some in (harm, benign))
            around = Moments(found[0].shape[1] * _PATCH**2)
            for patches in _patches(none):
                around.add(rearrange(patches, "b p f -> (b p) f"))
            weight, offset = discriminant(_mean(_patches(found)), around)
            weight, offset = discriminant(_mean(_likest(_patches(found), weight)), around)
            scores = torch.stack([_scores(latents, weight, offset) for latents in none])
            scale, middle = _tail(scores.amax(dim=0))  # stretches are compared, each in its own units
            weights.append(weight / scale)
            offsets.append((offset + middle) / scale)
        made = cls(edges, torch.stack(weights), torch.stack(offsets), math.inf)
        shown, highest = (
            torch.stack([made.score(latents, share) for share, latents in some]).amax(dim=0)
            for some in (harm, held_out)
        )
        least = max((1 - UNASKED) * len(highest), fewest(alarms))
        threshold = conformal_threshold(without_unasked(highest, shown, least), alarms)
        return cls(edges, made.weights, made.offsets, threshold)

    def score(self, latents: Tensor, share: float) -> Tensor:
        """(B, C, H, W), or (B, C, F, H, W) of a video, at this share of the schedule -> (B,)."""
        stretch = int(torch.bucketize(share, self.edges[1:-1], right=True))
        weight, offset = self.weights[stretch].to(latents.device), self.offsets[stretch].to(latents.device)
        if latents.shape[1] * _PATCH**2 != len(weight):
            raise GuidanceError(
                f"a picture detector of {len(weight) // _PATCH**2} latent channels was given {latents.shape[1]}; fit it"
                " for this model"
            )
        return _scores(latents, weight, offset)


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


def _flat(latents: Tensor) -> Tensor:
    """(B, C, H, W); frames of a video are pictures beside each other."""
    return rearrange(latents, "b c f h w -> b c h (f w)") if latents.ndim == 5 else latents


def _patches(pictures: Iterable[Tensor]) -> Iterator[Tensor]:
    """All patches of predicted latents (B, C, H, W), a few pictures at a time: (b, P, C x 5 x 5)."""
    for latents in pictures:
        for part in _flat(latents).split(_AT_ONCE):
            yield rearrange(F.unfold(part.float(), _PATCH), "b f p -> b p f")


def _likest(patches: Iterable[Tensor], weight: Tensor) -> Iterator[Tensor]:
    """Of each picture's patches (b, P, F) those with the highest scores."""
    for part in patches:
        count = max(_STRONGEST, round(_REFINED * part.shape[1]))
        chosen = (part @ weight.to(part.device)).topk(min(count, part.shape[1]), dim=1).indices
        yield torch.gather(part, 1, chosen[..., None].expand(-1, -1, part.shape[-1]))


def _mean(patches: Iterable[Tensor]) -> Tensor:
    """Of (b, P, F) each: (F,) float64."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in patches:
        total, count = total + part.double().sum(dim=(0, 1)).cpu(), count + part.shape[0] * part.shape[1]
    return total / count


def _scores(latents: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): of the strongest patches."""
    flat = _flat(latents).float()
    each = F.conv2d(flat, weight.view(1, flat.shape[1], _PATCH, _PATCH)).flatten(1) - offset
    return each.topk(min(_STRONGEST, each.shape[1]), dim=1).values.mean(dim=1)


def without_unasked(scores: Tensor, shown: Tensor, least: float) -> Tensor:
    """The scores of other pictures less those of pictures that show a thing although nobody asked for it: those nearer
    to its own pictures than to the others (by medians). They would set a threshold that nothing passes.

    Args:
        scores: (n,) of pictures that nobody asked it for. shown: (m,) of pictures with it. least: where fewer would be
            left, the scores do not tell the two apart, and all are kept.
    """
    unlike = scores[scores < (scores.median() + shown.median()) / 2]
    return unlike if len(unlike) >= least else scores


def _tail(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of harmless pictures' scores (B,): (how far the highest lie above the middle, the middle)."""
    middle = scores.median()
    highest = scores.topk(max(1, round(_TAIL * len(scores)))).values.mean()
    return (highest - middle).clamp_min(1e-6), middle


def _steps(steps: Sequence[tuple[float, Tensor]], first: float, last: float) -> list[Tensor]:
    """The predicted pictures of the steps of a stretch."""
    found = [latents for share, latents in steps if first <= share < last or (last >= 1 and share >= 1)]
    if not found:
        raise GuidanceError(
            f"no step from {first:g} to {last:g} of the schedule; fit with more steps, or with fewer stretches"
        )
    return found


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
    metadata = {"format": FORMAT, "version": _VERSION, "categories": "|".join(pair.category for pair in pairs)}
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
    if metadata.get("version") != _VERSION:
        raise GuidanceError(
            f"{str(path)!r} holds detectors of version {metadata.get('version')}, and this release reads {_VERSION}:"
            " fit them again (`semiperm guard fit`), or update semiperm where theirs is the higher"
        )
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
