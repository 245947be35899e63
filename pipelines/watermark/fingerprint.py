"""Which model a reader of marks, or weights of channels, belong to."""

from ...methods.watermark.reader import model_fingerprint
from ..family import denoiser_of

__all__ = ["fingerprint"]


def fingerprint(pipe) -> str:
    """16 hex digits that tell a model: of its denoiser's and its autoencoder's matrices."""
    return model_fingerprint(denoiser_of(pipe)[0].state_dict(), pipe.vae.state_dict())
