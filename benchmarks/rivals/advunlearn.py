"""AdvUnlearn-style: the text encoder is trained to erase a concept under words that bring it back, and keeps the rest.

    p* = argmin_p |e(x_t, E(p + c)) - e_0(x_t, c)|^2                                        the attack, on a prefix p
    L  = |e(x_t, E(p* + c)) - [e_0(x_t) - eta (e_0(x_t, c) - e_0(x_t))]|^2
         + gamma mean_r |e(x_t, E(r)) - e_0(x_t, r)|^2,      eta = 1, gamma = .3

p are K = 5 free token embeddings before the phrase, r captions of other things, e_0 the untouched model. Only the text
encoder E is trained, all of it but the tables of tokens and positions.

Source: AdvUnlearn (arXiv 2405.15234), equations 3 to 6; Adam at 1e-5. We differ, for its cost: 200 steps with an attack
of 5 (the paper: 1000 with 30), whose steps are projected gradients within a ball (methods/training/adversary.py) about
random words; two captions to keep at each step, from the package's general ones (the paper takes names of ImageNet and
COCO), at the same latents; pictures on their way under the untouched model. All CLIP text encoders are trained, T5 not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.membranes.captions import PRESERVE
from ...methods.membranes.phrases import fold, names
from ...methods.training.adversary import adversarial_texts
from ...methods.training.objectives import anchoring_loss, erasing_loss, erasing_target
from ...pipelines.attacks.encoding import OpenEncoder
from ...pipelines.prediction import Predictor
from ...pipelines.text import encode_text
from ..erasure.methods import Told
from .shared import fitted, in_place
from .training import Pictures, clip_parameters, clip_rate, encode_open, rows_of, trained

_PREFIX, _KEPT, _GUIDANCE = 5, 2, 3.0  # tokens of the paper's attack; captions a step; ESD's


def erase(
    pipe, told: Told, steps: int = 200, attack: int = 5, rate: float = 1e-5, gamma: float = 0.3, seed: int = 0
) -> AbstractContextManager[dict]:
    """Erase by adversarial training of the text encoder.

    Args:
        steps: of the optimiser, >= 1. attack: steps of each search, >= 1. rate: for CLIP-L. gamma: weight of what is
            kept, >= 0.
    """
    options = {"steps": steps, "attack": attack, "rate": rate, "gamma": gamma, "seed": seed}
    return in_place(pipe, fitted(told, "advunlearn", options, lambda: _fit(pipe, told, **options)))


def _fit(pipe, told: Told, steps: int, attack: int, rate: float, gamma: float, seed: int) -> dict[str, Tensor]:
    if steps < 1 or attack < 1 or not 0 <= gamma < float("inf"):
        raise MembraneError(f"steps={steps}, attack={attack}, gamma={gamma}; expected 1 or more twice, and 0 or more")
    phrases = told.phrases
    trains = clip_parameters(pipe, lambda path, layers: "embedding" not in path, "AdvUnlearn")
    predictor, generator = Predictor(pipe), torch.Generator().manual_seed(seed)
    own = [fold(phrase) for phrase in phrases]
    kept = [caption for caption in PRESERVE if not names(caption, own)]
    texts = encode_text(pipe, [*phrases, ""])
    doors = [OpenEncoder(pipe, _PREFIX, phrase) for phrase in phrases]
    words = doors[0].allowed(phrases)
    pictures, empty = Pictures(predictor, 1, 50, seed), rows_of(texts, 1, len(phrases))

    def drawn(count: int, of: int) -> list[int]:
        return torch.randint(of, (count,), generator=generator).tolist()

    with trained(pipe, trains, clip_rate(pipe, rate)) as trainee:
        for step in range(steps):
            turn = step % len(phrases)
            door, concept = doors[turn], rows_of(texts, 1, turn)
            latents, now = pictures.now()
            rest = [kept[i] for i in drawn(_KEPT, len(kept))]
            with trainee.untouched():
                asked, free = (predictor(latents, now, *text) for text in (concept, empty))
                old = encode_text(pipe, rest)
                same = [predictor(latents, now, *rows_of(old, 1, row)) for row in range(_KEPT)]
            ids = words[drawn(_PREFIX, len(words))][None]

            def shown(prefix: Tensor, door=door, ids=ids, latents=latents, now=now) -> Tensor:
                return predictor(latents, now, *door.encode(ids, prefix))

            def back(prefix: Tensor, shown=shown, asked=asked) -> Tensor:
                return erasing_loss(shown(prefix), asked)

            prefix = adversarial_texts(back, door.table[ids.to(door.table.device)], attack, 1.0)
            made = shown(prefix)
            loss = erasing_loss(made, erasing_target(asked, free, 1.0)).mean()
            new = encode_open(pipe, rest)
            for row in range(_KEPT):
                moved = predictor(latents, now, *rows_of(new, 1, row))
                loss = loss + gamma / _KEPT * anchoring_loss(moved, same[row]).mean()
            trainee.step(loss)
            pictures.move(free + _GUIDANCE * (asked - free))
        return trainee.values()
