"""Hard prompts and learned embeddings against whatever protects a pipeline: gates, membranes, edited weights.

targets = targets_from_model(pipe, "a photo of a robot")       # of the untouched model
with apply_membranes(pipe, membranes):
    found = find_prompts(pipe, targets, without=["robot"])     # words that are not the concept's
    learned = learn_embedding(pipe, targets)                   # no words at all
    pictures = pipe(found[0].prompt).images
    pictures = pipe(**learned.inputs()).images
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...methods.attacks.embeddings import learn_tensors
from ...methods.attacks.prompts import PromptSearch, search_tokens
from ...methods.errors import SemipermError
from ..family import Pipeline, family_of
from ..text import encode_text
from .encoding import OpenEncoder, learned_words
from .guided import predictor_of
from .targets import Targets

__all__ = ["FoundPrompt", "LearnedEmbedding", "find_prompts", "learn_embedding", "prompt_loss", "ring_a_bell"]


@dataclass(frozen=True)
class FoundPrompt:
    """A prompt that can be typed, its found tokens, and its loss as the pipeline reads the text."""

    prompt: str
    ids: tuple[int, ...]
    loss: float


@dataclass(frozen=True, eq=False)
class LearnedEmbedding:
    """Text that no word says.

    Args:
        hidden: (1, N, d). pooled: (1, p) or None. losses: of every step.
        ids, tokens: of scope "tokens", words that may stand for it, and (K, sum of widths) what they then say: see
            `learned_words`.
    """

    hidden: Tensor
    pooled: Tensor | None
    losses: tuple[float, ...]
    ids: tuple[int, ...] = ()
    tokens: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the pipeline's call."""
        given = {"prompt_embeds": self.hidden}
        return given if self.pooled is None else given | {"pooled_prompt_embeds": self.pooled}


def find_prompts(
    pipe: Pipeline,
    targets: Targets,
    prompt: str = "",
    config: PromptSearch | None = None,
    *,
    without: Sequence[str] = (),
    points: int = 2,
    progress: Callable[[int, float], None] | None = None,
) -> list[FoundPrompt]:
    """Search for words after which a protected pipeline predicts what the attacker wants.

    min_w mean |e(z, t, T(w prompt)) - target|^2, differentiated through denoiser, membranes, gates, safe guidance
    and text encoders.

    Args:
        pipe: the protected pipeline, SD1.x, SD2, SDXL, SD3 or Flux.
        targets: `targets_from_model` (P4D) or `targets_from_pictures` (UnlearnDiffAtk).
        prompt: what follows the found words.
        config: see `PromptSearch`; "relaxed" is UnlearnDiffAtk's search, "projected" P4D's.
        without: phrases whose words may not be found, so that what is found does not name the concept.
        points: of the targets at each step.
        progress: called with (step, least loss).

    Returns:
        Best first by the loss at all targets, of the text as a user would type it.

    Raises:
        SemipermError: an unsupported pipeline, nothing allowed, or losses that are not finite.

    Source: UnlearnDiffAtk (arXiv 2310.11868), P4D (arXiv 2309.06135); both attack weights, here the gate's and the
    membrane's gradient is followed, too.
    """
    config = config or PromptSearch()
    family_of(pipe, video=False)
    encoder, predictor = OpenEncoder(pipe, config.tokens, prompt), predictor_of(pipe)

    def loss_of(ids: Tensor, embeddings: Tensor, step: int) -> Tensor:
        said = [encoder.text_of(row) for row in ids.tolist()]
        return targets.drawn(points, step).loss(predictor, *encoder.encode(ids, embeddings), said)

    found = search_tokens(loss_of, encoder.table, encoder.allowed(without), config, progress)
    texts = {encoder.text_of(one.ids): one.ids for one in found}
    losses = prompt_loss(pipe, targets, list(texts))
    ranked = [FoundPrompt(text, ids, loss) for (text, ids), loss in zip(texts.items(), losses, strict=True)]
    return sorted(ranked, key=lambda one: one.loss)


def ring_a_bell(
    pipe: Pipeline,
    prompt: str,
    pairs: Sequence[tuple[str, str]],
    config: PromptSearch | None = None,
    *,
    strength: float = 3.0,
    without: Sequence[str] = (),
    progress: Callable[[int, float], None] | None = None,
) -> list[FoundPrompt]:
    """Search for words whose text features are those of a prompt plus the concept's direction; no denoiser is asked.

    min_w |T(w) - [T(prompt) + eta v]|^2,  v = mean (T(p+) - T(p-))

    Args:
        pipe: any pipeline with the text encoder.
        prompt: that the concept is added to; it need not name it.
        pairs: (with the concept, without it) texts, otherwise alike.
        config: its `search` is taken as it is; Ring-A-Bell's is "genetic".
        strength: eta; 3 for nudity and 5.5 for violence in the paper.
        without, progress: as in `find_prompts`.

    Raises:
        SemipermError: no pairs, or as `find_prompts`.

    Source: Ring-A-Bell (arXiv 2310.10012), equations 2 and 3.
    """
    if not pairs:
        raise SemipermError("no pairs of texts with and without the concept were given; expected at least one")
    config = config or PromptSearch(search="genetic", tokens=16)
    encoder = OpenEncoder(pipe, config.tokens)
    base, with_it, without_it = (encode_text(pipe, list(t)).hidden for t in ([prompt], *zip(*pairs, strict=True)))
    aim = base + strength * (with_it - without_it).mean(0, keepdim=True)

    def distance(hidden: Tensor) -> Tensor:
        return (hidden - aim).float().square().flatten(1).mean(1)

    def loss_of(ids: Tensor, embeddings: Tensor, step: int) -> Tensor:
        return distance(encoder.encode(ids, embeddings)[0])

    found = search_tokens(loss_of, encoder.table, encoder.allowed(without), config, progress)
    texts = {encoder.text_of(one.ids): one.ids for one in found}
    losses = distance(encode_text(pipe, list(texts)).hidden).tolist()
    ranked = [FoundPrompt(text, ids, loss) for (text, ids), loss in zip(texts.items(), losses, strict=True)]
    return sorted(ranked, key=lambda one: one.loss)


def learn_embedding(
    pipe: Pipeline,
    targets: Targets,
    prompt: str = "",
    *,
    scope: str = "tokens",
    tokens: int = 4,
    steps: int = 200,
    learning_rate: float = 0.02,
    points: int = 4,
    without: Sequence[str] = (),
    progress: Callable[[int, float], None] | None = None,
) -> LearnedEmbedding:
    """Learn an embedding after which a protected pipeline predicts what the attacker wants.

    Args:
        pipe, targets: as in `find_prompts`.
        prompt: scope "tokens": what follows the learned tokens; scope "hidden": where the text begins from.
        scope: "tokens" (textual inversion: what goes into the text encoder) or "hidden" (everything that comes out of
            it: the strongest attack on a text, and no longer one that words could stand for).
        tokens: of scope "tokens". steps, learning_rate: of Adam. points: of the targets at each step.
        without: phrases whose words may not stand for what is learned; those of the prompt do not either.

    Raises:
        SemipermError: another scope, an unsupported pipeline, or losses that are not finite.

    Source: textual inversion (arXiv 2208.01618); concept inversion (arXiv 2308.01508).
    """
    if scope not in ("tokens", "hidden") or tokens < 1:
        raise SemipermError(f"scope={scope!r}, tokens={tokens}; expected 'tokens' or 'hidden', and at least one token")
    family_of(pipe, video=False)
    predictor, ids, said = predictor_of(pipe), torch.zeros(1, 0, dtype=torch.int64), prompt
    if scope == "hidden":
        features = encode_text(pipe, [prompt])
        start = [t for t in (features.hidden, features.pooled) if t is not None]

        def words(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
            return tensors[0], tensors[1] if len(tensors) > 1 else None

    else:
        encoder = OpenEncoder(pipe, tokens, prompt)
        ids = encoder.allowed([prompt, *without])[:tokens][None]
        if ids.shape[1] < tokens:
            raise SemipermError(f"{tokens} words are to be learned, and {ids.shape[1]} of the vocabulary are free")
        said = encoder.text_of(ids[0].tolist())
        start = [encoder.table.mean(0).expand(1, tokens, -1)]  # between all words: none is meant

        def words(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
            return encoder.encode(ids, tensors[0])

    def loss_of(tensors: Sequence[Tensor], step: int) -> Tensor:
        hidden, pooled = words(tensors)
        with learned_words(pipe, ids[0].tolist(), tensors[0][0].detach()) if ids.numel() else contextlib.nullcontext():
            return targets.drawn(points, step).loss(predictor, hidden, pooled, [said]).sum()

    learned = learn_tensors(loss_of, start, steps, learning_rate, progress)
    with torch.no_grad():
        hidden, pooled = words(learned.tensors)
    dtype = predictor.denoiser.dtype
    pooled = None if pooled is None else pooled.to(dtype)
    kept = learned.tensors[0][0] if ids.numel() else None
    return LearnedEmbedding(hidden.to(dtype), pooled, learned.losses, tuple(ids[0].tolist()), kept)


@torch.no_grad()
def prompt_loss(pipe: Pipeline, targets: Targets, prompts: Sequence[str]) -> list[float]:
    """The loss of prompts at all targets, each encoded as a user's would be."""
    predictor, found = predictor_of(pipe), []
    for prompt in prompts:
        features = encode_text(pipe, [prompt])
        losses = []
        for first in range(0, len(targets.latents), 16):
            some = Targets(*(t[first : first + 16] for t in (targets.latents, targets.timesteps, targets.wanted)))
            losses.append(some.loss(predictor, features.hidden, features.pooled, [prompt]) * len(some.latents))
        found.append(float(torch.cat(losses).sum() / len(targets.latents)))
    return found
