"""What a denoiser predicts while safe guidance is at work on it, outside of any run: for attacks on a guided model.

Each noise level is one call of the denoiser, as in a run, with the negative prompt's rows where guidance needs them,
and as if a run began with it: no momentum. What safe guidance decides (which words it projects, whether a detector
fires) has no gradient and is taken as it is; an edited text passes gradients as the text itself would (arXiv
1802.00420, section 4.1.1: backward pass differentiable approximation).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..family import Pipeline
from ..guidance.apply import SafeGuidanceHandle
from ..prediction import Predictor
from ..rows import row_layout
from ..text import encode_text

__all__ = ["predictor_of"]


def predictor_of(pipe: Pipeline) -> Predictor:
    """A pipeline's denoiser as an attacker asks it, whatever protects it."""
    handle = SafeGuidanceHandle.on(pipe)
    return Predictor(pipe) if handle is None or handle.config.strength == 0 else _Guided(pipe, handle)


class _Guided(Predictor):
    """As a `Predictor`; rows are prompts, and what comes back is the guided prediction for them."""

    def __init__(self, pipe: Pipeline, handle: SafeGuidanceHandle):
        super().__init__(pipe)
        self.handle, self._none = handle, encode_text(pipe, [""])

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        hidden: Tensor,
        pooled: Tensor | None,
        words: Sequence[str] | None = None,
    ) -> Tensor:
        order, parts = [], []
        for time in timesteps.unique():
            rows = (timesteps == time).nonzero()[:, 0].tolist()
            said = None if words is None else [words[row] for row in rows]
            own = None if pooled is None else pooled[rows]
            parts.append(self._at(latents[rows], timesteps[rows], hidden[rows], own, said))
            order += rows
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _at(
        self, latents: Tensor, times: Tensor, hidden: Tensor, pooled: Tensor | None, words: Sequence[str] | None
    ) -> Tensor:
        handle, paired = self.handle, self.handle.root.paired
        none, none_pooled = (
            None if text is None else text.expand(len(hidden), *text.shape[1:]).to(hidden)
            for text in (self._none.hidden, self._none.pooled)
        )
        one_call = self.family.one_call
        texts = (hidden, *[none] * (paired and one_call), pooled, *[none_pooled] * (paired and one_call))
        handle.started(self.pipe)
        handle.encoded(self.pipe, texts, {"prompt": None if words is None else list(words)})
        if paired and not one_call:
            handle.encoded(self.pipe, (none, none_pooled), {"prompt": [""] * len(hidden)})
        self._pass_through(hidden, pooled)
        if not (paired and one_call):
            with row_layout("positive"):
                return super().__call__(latents, times, hidden, pooled)
        both = None if pooled is None else torch.cat([none_pooled, pooled])
        with row_layout(*["negative"] * len(hidden), *["positive"] * len(hidden)):
            made = super().__call__(torch.cat([latents] * 2), torch.cat([times] * 2), torch.cat([none, hidden]), both)
        return made[len(hidden) :]

    def _pass_through(self, hidden: Tensor, pooled: Tensor | None) -> None:
        """Gradients go through edited texts to the prompt's own."""
        prompts = self.handle.now.prompts
        if prompts is None or not self.handle.config.having("text"):
            return
        prompts.edited = hidden + (prompts.edited - hidden).detach()
        if pooled is not None and prompts.edited_pooled is not None:
            prompts.edited_pooled = pooled + (prompts.edited_pooled - pooled).detach()
