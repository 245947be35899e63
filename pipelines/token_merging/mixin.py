"""Negative token merging as methods of a pipeline."""

from __future__ import annotations

from ...methods.token_merging.config import NegativeTokenMergingConfig
from .apply import TokenMergingHandle, apply_negative_token_merging, remove_negative_token_merging

__all__ = ["TokenMergingMixin"]


class TokenMergingMixin:
    """Put it before any diffusers pipeline class of a supported family.

    class Pushed(TokenMergingMixin, StableDiffusionPipeline): ...
    """

    def apply_negative_token_merging(self, config: NegativeTokenMergingConfig | None = None) -> TokenMergingHandle:
        """`semiperm.apply_negative_token_merging(self, config)`."""
        return apply_negative_token_merging(self, config)

    def remove_negative_token_merging(self) -> None:
        """`semiperm.remove_negative_token_merging(self)`."""
        remove_negative_token_merging(self)
