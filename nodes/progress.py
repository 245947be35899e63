"""How far a sampling run of ComfyUI has come: the inverse of its `percent_to_sigma`."""

from __future__ import annotations

from ..methods.errors import SemipermError


class Progress:
    """The share of the unshifted schedule (`methods.schedule`) at which a call of the denoiser stands.

    Args:
        sampling: the model's `model_sampling`; its `percent_to_sigma` says which noise level each share has.
    """

    _HALVINGS = 24  # of [0, 1]: exact to 6e-8

    def __init__(self, sampling):
        self._sampling, self._known = sampling, {}

    def __call__(self, options: dict) -> tuple[float, float]:
        """(share, sigma) of a call with these transformer_options.

        Raises:
            SemipermError: they do not say the noise level.
        """
        if options.get("sigmas") is None:
            raise SemipermError(
                "the model was called without `sigmas` in its transformer_options, so the step is unknown; another node"
                " calls it by itself: put ours after that node"
            )
        sigma = float(options["sigmas"].max())
        if sigma not in self._known:
            self._known[sigma] = self.share(sigma)
        return self._known[sigma], sigma

    def share(self, sigma: float) -> float:
        """0 at pure noise, 1 at the image."""
        low, high = 0.0, 1.0
        for _ in range(self._HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self._sampling.percent_to_sigma(middle)) > sigma else (low, middle)
        return high
