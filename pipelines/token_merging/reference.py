"""The reference rows of negative token merging: images to noisy latents, masks and words, for every family."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from ...methods.errors import TokenMergingError
from ...methods.token_merging.merging import fitted_images, fitted_masks, token_mask
from ..latents import encode_pixels, pixels_per_latent
from ..scheduler import alphas_of, noise_levels
from ..text import encode_text


class Reference:
    """What is known of the reference images once the size of the latents is: encoded once per size, on demand."""

    def __init__(self, handle, pipe):
        self.handle, self.family, self.config = handle, handle.family, handle.config
        self.images = self.config.reference or ()
        self.masked = self.config.mask is not None or self.config.fit == "pad"
        self.alphas = None if self.family.flow else alphas_of(pipe)
        self._latents: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        self._texts: dict[tuple, tuple[Tensor, Tensor | None]] = {}

    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(share of the image, share of the noise) in what the denoiser is given at this timestep, (1,) each."""
        if self.alphas is not None:
            self.alphas = self.alphas.to(timestep.device)
        return noise_levels(self.family, timestep, self.alphas)

    def prepare(self, height: int, width: int, device=None) -> tuple[Tensor, Tensor]:
        """Latents (R, C, height, width) of the reference images, scaled as the denoiser expects, and noise; cached.

        Raises:
            TokenMergingError: a mask with nothing white in the part that is shown.
        """
        key = (height, width)
        if key not in self._latents:
            if torch.compiler.is_compiling():
                raise TokenMergingError(
                    f"the reference was not encoded for latents of {height} x {width} before the model was compiled;"
                    " call handle.prepare(image_height, image_width) first"
                )
            pipe = self.handle.pipe
            scale = pixels_per_latent(pipe)
            fitted_masks(self.config, height, width)
            pixels = fitted_images(self.config, height * scale, width * scale) * 2 - 1
            if self.family.video:  # of one frame
                latents = encode_pixels(pipe, [rearrange(pixels, "r c h w -> r c 1 h w")])
                latents = rearrange(latents, "r c 1 h w -> r c h w")
            else:
                latents = encode_pixels(pipe, [pixels])
            draws = [
                torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(self.config.seed + r))
                for r in range(len(latents))
            ]
            self._latents[key] = latents, torch.stack(draws).to(latents.device)
        latents, noise = self._latents[key]
        if device is not None and latents.device != device:
            self._latents[key] = latents, noise = latents.to(device), noise.to(device)
        return latents, noise

    def rows(self, height: int, width: int, timestep: Tensor) -> Tensor:
        """The reference rows (R, C, height, width) at a step's noise level; the noise is the same at every step."""
        latents, noise = self.prepare(height, width, timestep.device)
        if not self.config.noise_reference:
            return latents
        of_image, of_noise = self.levels(timestep)
        return of_image * latents + of_noise * noise

    def mask(self, tokens: int, height: int, width: int, device) -> Tensor | None:
        """(R, tokens) bool on a layer's grid, or None."""
        if not self.masked:
            return None
        key = (tokens, height, width)
        if key not in self._masks:
            self._masks[key] = token_mask(fitted_masks(self.config, height, width), tokens, height, width)
        self._masks[key] = self._masks[key].to(device)
        return self._masks[key]

    def text(self, length: int) -> tuple[Tensor, Tensor | None]:
        """The reference prompt's embeddings (1, length, d) and pooled embedding (1, p) or None; cached."""
        if length not in self._texts:
            if torch.compiler.is_compiling():
                raise TokenMergingError(
                    f"the reference prompt was not encoded for {length} text positions before the model was compiled"
                    f" (but for {sorted(self._texts) or 'none'}); call handle.prepare(image_height, image_width,"
                    " max_sequence_length) with the length that you will call the pipeline with"
                )
            clip = self.handle.pipe.tokenizer_max_length if len(self.family.segments) > 1 else 0
            self.encode(length - clip or None)
            if length not in self._texts:
                raise TokenMergingError(
                    f"the prompts have {length} text positions, the reference prompt {sorted(self._texts)}; expected"
                    " the same: call the pipeline with prompts rather than with embeddings of another length"
                )
        return self._texts[length]

    def encode(self, max_sequence_length: int | None = None) -> None:
        """Encode the reference prompt for prompts of this length."""
        features = encode_text(self.handle.pipe, [self.config.reference_prompt], max_sequence_length)
        self._texts[features.hidden.shape[1]] = features.hidden, features.pooled

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The sizes of latents for which the images are encoded."""
        return list(self._latents)
