"""Validation on what is never trained on: other wordings, other things to keep, other noise, on the untouched path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sampling import next_latents
from .model import Embedding, Processes, TrainedModel
from .objectives import anchoring_loss, erasing_loss, erasing_target
from .packed import PackedMembranes, seed_of
from .words import Words

__all__ = ["ROWS", "Validation"]

ROWS = 4  # of each concept, and of what is kept: enough to see a trend, cheap enough to look often


class Validation:
    """Latents of the untouched model at `ROWS` places of the schedule, and what it predicts there.

    Concept rows lie on the path of the concept's own pictures, kept rows on that of other things'. They are made anew
    when a run is resumed, to the same bits.
    """

    def __init__(self, model: TrainedModel, words: Words, packed: PackedMembranes, processes: Processes):
        self.model, self.words, self.packed, self.processes = model, words, packed, processes
        self.device = next(iter(packed.named().values())).device
        self._kept: dict[tuple[str, ...], tuple] = {}
        self._rows = [self._made(name) for name in packed.names]

    def measure(self, k: int) -> dict[str, float]:
        """loss: as in training. erased: 0 at the target, 1 for the untouched model. moved: of what is kept, by how much
        of the untouched distance from the concept to its target."""
        config = self.words.config
        (latents, times, concept, target, before), (kept_latents, kept_times, kept, e_kept) = self._rows[k]
        owners, words = [k] * len(latents), (concept, kept)
        with torch.no_grad(), self.packed.on(owners + [k] * len(kept_latents)):
            hidden = torch.cat([w[0] for w in words])
            pooled = None if concept[1] is None else torch.cat([w[1] for w in words])
            made = self.model(torch.cat([latents, kept_latents]), torch.cat([times, kept_times]), hidden, pooled)
        erasing = erasing_loss(made[: len(latents)], target).mean()
        anchoring = anchoring_loss(made[len(latents) :], e_kept).mean()
        loss = erasing + config.anchor_weight * anchoring
        figures = {"loss": loss, "erased": erasing / before, "moved": anchoring / before}
        # devices may round differently: all processes go by the first one's
        sent = self.processes.broadcast(torch.stack(list(figures.values())).float())
        return {name: float(f"{float(value):.6g}") for name, value in zip(figures, sent, strict=True)}

    def _made(self, name: str) -> tuple:
        config = self.words.config
        captions, surrogates, others = self.words.held_out(name, ROWS)
        concept, surrogate = self.words.encode(captions), self.words.encode(surrogates)
        with torch.no_grad():
            latents, times = self._path(concept, name)
            e_concept, e_surrogate = (self.model(latents, times, *words) for words in (concept, surrogate))
            target = erasing_target(e_concept, e_surrogate, config.aim)
            if (key := tuple(others)) not in self._kept:  # the same for most concepts
                kept = self.words.encode(others)
                kept_latents, kept_times = self._path(kept, "")
                self._kept[key] = kept_latents, kept_times, kept, self.model(kept_latents, kept_times, *kept)
        before = erasing_loss(e_concept, target).mean().clamp_min(1e-12)
        return (latents, times, concept, target, before), self._kept[key]

    def _path(self, words: Embedding, name: str) -> tuple[Tensor, Tensor]:
        """Latents (ROWS, ...) of guided pictures of the words, each at its own place of the schedule, and timesteps."""
        config, (hidden, pooled) = self.words.config, words
        seeds = [seed_of(config.seed, "validation", name, row) for row in range(ROWS)]
        latents = torch.stack(
            [torch.randn(*self.model.shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )
        latents, steps = latents.to(self.device), config.sampling_steps
        times = self.model.times(steps, latents).to(self.device)
        places = [(2 * row + 1) * steps // (2 * ROWS) for row in range(ROWS)]
        none = self.words.encode([""])
        for step in range(max(places)):
            rows = [row for row, place in enumerate(places) if place > step]  # those that are not there yet
            now, then = times[step].expand(len(rows)), times[step + 1].expand(len(rows))
            about = hidden[rows], None if pooled is None else pooled[rows]
            made = self.model(latents[rows], now, *about)
            if config.sampling_guidance != 1:
                blank = none[0].expand(len(rows), -1, -1), None if pooled is None else none[1].expand(len(rows), -1)
                without = self.model(latents[rows], now, *blank)
                made = without + config.sampling_guidance * (made - without)
            levels = self.model.levels(now), self.model.levels(then)
            latents[rows] = next_latents(self.model.kind, latents[rows], made, *levels)
        return latents, times[places]
