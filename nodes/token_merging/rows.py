"""Which rows of a denoiser's batch are pushed from which, and the reference rows that are added to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.utils
import torch
from einops import rearrange, repeat
from torch import Tensor

from ...methods.errors import TokenMergingError
from ...methods.token_merging.config import NegativeTokenMergingConfig
from ...methods.token_merging.merging import (
    MergeRows,
    diversity_rows,
    fitted_images,
    fitted_masks,
    reference_rows,
)
from ..extra_rows import Rows


@dataclass(frozen=True, eq=False)
class Groups:
    """Which rows are pushed, and from which.

    Args:
        rows: gate and pairs of the rows that came from the sampler.
        start, count: the rows that they are matched with, in the layers' batch.
        sources: for each added row the row whose further inputs it takes; empty in diversity mode.
    """

    rows: MergeRows
    start: int
    count: int
    sources: list[int]


@dataclass(eq=False)
class Layout:
    """What token merging does to one batch, and how its tokens lie.

    Args:
        images: ("positive" or "negative", image) of each row that came from the sampler.
        groups: which of them are pushed from which rows.
        size: (height, width) of the latent.
        grid: (tokens, rows, columns) where it is the same in all layers. text: tokens of the text.
        strength, threshold: `knobs` of the rows that others are pushed from.
    """

    images: list[tuple[str, int]]
    groups: Groups
    size: tuple[int, int]
    grid: tuple[int, int, int] | None
    text: int
    strength: Tensor
    threshold: Tensor
    _padded: dict[int, MergeRows] = field(default_factory=dict)

    def padded(self, total: int) -> MergeRows:
        """The rows for a batch that ends in rows which are not pushed."""
        if total not in self._padded:
            self._padded[total] = self.groups.rows.padded(total - len(self.images))
        return self._padded[total]


def row_kinds(rows: Rows, names: Sequence[str | None]) -> list[tuple[str, int]]:
    """("positive" or "negative", image) of each row that came from the sampler.

    Args:
        names: for each chunk what the guider calls its conditioning; None: it did not say.
    """
    found = []
    for i in range(rows.sampled):
        chunk = rows.chunk_of(i)
        negative = rows.chunks[chunk] != 0 if names[chunk] is None else "negative" in names[chunk]
        found.append(("negative" if negative else "positive", i - chunk * rows.each))
    return found


def groups_of(
    config: NegativeTokenMergingConfig,
    images: Sequence[tuple[str, int]],
    rows: Rows,
    context: Tensor | None,
    device: torch.device,
) -> Groups | None:
    """Which rows are pushed from which, or None where no row is pushed.

    Args:
        images: of `row_kinds`.
        rows: of this call; further reference rows come behind all of them.
        context: (rows.total, T, C): rows of one text share reference rows; None: all do (official: those of a chunk).

    Raises:
        TokenMergingError: diversity mode with a single image.
    """
    groups, sources = [-1] * len(images), []
    for i, (kind, _) in enumerate(images):
        if config.rows == "conditional" and kind == "negative":
            continue
        if config.mode == "diversity" or config.compat == "official":
            owner = rows.chunk_of(i) * rows.each
        else:
            owner = next((s for s in sources if context is None or torch.equal(context[i], context[s])), i)
        if owner not in sources:
            sources.append(owner)
        groups[i] = sources.index(owner)
    if not sources:
        return None
    if config.mode == "diversity":
        return Groups(diversity_rows(groups, config.diversity, device), 0, len(images), [])
    count = len(config.reference)
    sources = [source for source in sources for _ in range(count)]
    return Groups(reference_rows(groups, count, device), rows.total, len(sources), sources)


def reference_text(reference) -> tuple[Tensor, Tensor | None] | None:
    """((1, T, C), pooled (1, P) or None) of a CONDITIONING.

    Raises:
        TokenMergingError: several conditionings, or several prompts in one.
    """
    if reference is None:
        return None
    if len(reference) != 1 or reference[0][0].shape[0] != 1:
        raise TokenMergingError(
            f"a reference conditioning of {len(reference)} parts; expected that of one CLIP Text Encode, not combined"
        )
    states, options = reference[0]
    return states, options.get("pooled_output")


class ReferenceImages:
    """The reference images and their masks, encoded once for each latent size."""

    def __init__(self, config: NegativeTokenMergingConfig, vae):
        self.config, self.vae = config, vae
        self.masks: list[Tensor] = []
        self._encoded: dict[tuple[int, int], list[Tensor]] = {}
        self._latents: Tensor | None = None
        self.free()

    def free(self) -> None:
        """Forget what lies on the model's device."""
        self._placed: dict[tuple, tuple[Tensor, Tensor]] = {}

    def encode(self, shape: Sequence[int], model) -> None:
        """Encode for latents of this shape. Before sampling: the VAE may need the place that the model then takes.

        Raises:
            TokenMergingError: a mask with nothing in the part that the latent shows, or another model's VAE.
        """
        size = height, width = tuple(shape[-2:])
        self.masks = fitted_masks(self.config, height, width)
        if size not in self._encoded:
            scale = self.vae.spacial_compression_encode()
            pixels = fitted_images(self.config, height * scale, width * scale)
            # one after the other: a batch might not fit beside the model
            self._encoded[size] = [self.vae.encode(rearrange(image[None], "1 c h w -> 1 h w c")) for image in pixels]
        latents = torch.cat([model.process_latent_in(latent) for latent in self._encoded[size]])
        channels = model.latent_format.latent_channels
        if latents.shape[1] != channels or tuple(latents.shape[-2:]) != size:
            raise TokenMergingError(
                f"this VAE makes latents {tuple(latents.shape[1:])}, the model takes {(channels, *size)}; connect the"
                " VAE that belongs to the model"
            )
        self._latents = latents.float()

    def rows(self, sampling, sigma: Tensor, x: Tensor) -> Tensor:
        """(R, C, ...) as the denoiser sees the references at this noise level, in the size of its input x."""
        key = (tuple(x.shape[2:]), x.device)
        if key not in self._placed:
            self._placed[key] = tuple(part.to(x.device) for part in self._fitted(x.shape[2:]))
        latents, noise = self._placed[key]
        if self.config.noise_reference:
            latents = sampling.calculate_input(sigma, sampling.noise_scaling(sigma, noise, latents))
        return latents.to(x.dtype)

    def _fitted(self, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        latents = self._latents
        if tuple(latents.shape[-2:]) != tuple(size[-2:]):  # a conditioning for an area of the picture
            latents = comfy.utils.common_upscale(latents, size[-1], size[-2], "bilinear", "center")
        if len(size) == 3:  # a video: the picture stands still
            latents = latents if latents.ndim == 5 else rearrange(latents, "r c h w -> r c 1 h w")
            latents = repeat(latents[:, :, :1], "r c 1 h w -> r c f h w", f=size[0])
        noise = [
            torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(self.config.seed + r))
            for r in range(latents.shape[0])
        ]
        return latents, torch.cat(noise)
