"""Words found by search: prompts that bring an erased concept back although they do not name it.

A search knows a table of token embeddings (V, d), which tokens it may use, and a loss of K embeddings. What the loss is
(the distance of predictions, of text features) and what it goes through (gates and membranes, edited weights) is the
caller's business.

    relaxed    UnlearnDiffAtk: weights over the vocabulary, hard in the forward pass, soft in the gradient
    projected  P4D, after PEZ: free embeddings, the loss and its gradient taken at the nearest tokens
    coordinate GCG: the gradient says which tokens to try, one exchanged in each of a population, the best is kept
    genetic    Ring-A-Bell: selection, crossover and mutation; no gradient

Sources: UnlearnDiffAtk (arXiv 2310.11868), section 4; P4D (arXiv 2309.06135), section 3 and PEZ (arXiv 2302.03668),
algorithm 1; GCG (arXiv 2307.15043), algorithm 1; Ring-A-Bell (arXiv 2310.10012), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SemipermError

__all__ = ["SEARCHES", "Found", "PromptSearch", "search_tokens"]

SEARCHES = ("relaxed", "projected", "coordinate", "genetic")
_MUTATED, _SURVIVORS = 0.25, 0.25  # of a genetic population; Ring-A-Bell's mutation rate, and a quarter kept by hand
_LIKELY = 64  # tokens of each place that "coordinate" draws from; GCG's 256 are of a vocabulary ten times as large


@dataclass(frozen=True)
class PromptSearch:
    """How tokens are searched for.

    Args:
        search: "relaxed", "projected", "coordinate" or "genetic".
        tokens: K >= 1, to be found. UnlearnDiffAtk takes 5, P4D 16, Ring-A-Bell 16 to 77.
        steps: of the optimiser, or generations.
        learning_rate: of Adam; None is 0.01 for "relaxed" (of weights in -1..1) and 0.1 for "projected", as published.
        population: of "coordinate" and "genetic", >= 4.
        kept: how many of the best token sequences are given back.
        seed: of the start and of all chance.

    Raises:
        SemipermError: a value outside its range.
    """

    search: str = "relaxed"
    tokens: int = 5
    steps: int = 100
    learning_rate: float | None = None
    population: int = 32
    kept: int = 4
    seed: int = 0

    def __post_init__(self):
        if self.search not in SEARCHES:
            raise SemipermError(f"search={self.search!r}; expected one of {', '.join(SEARCHES)}")
        for name, least in (("tokens", 1), ("steps", 1), ("population", 4), ("kept", 1), ("seed", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise SemipermError(f"{name}={getattr(self, name)!r}; expected a whole number, at least {least}")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise SemipermError(f"learning_rate={self.learning_rate}; expected a finite number above 0, or None")


@dataclass(frozen=True)
class Found:
    """A token sequence and the least loss that it was seen with."""

    ids: tuple[int, ...]
    loss: float


def search_tokens(
    loss_of: Callable[[Tensor, Tensor, int], Tensor],
    table: Tensor,
    allowed: Tensor,
    config: PromptSearch | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> list[Found]:
    """Search for K tokens with a small loss.

    Args:
        loss_of: (ids (P, K), embeddings (P, K, d), step) -> (P,) losses, differentiable in the embeddings. P is 1
            but for "coordinate" and "genetic". All that is drawn in it should depend on the step alone.
        table: (V, d).
        allowed: (A,) ids that may be used.
        progress: called with (step, least loss so far).

    Returns:
        At most `config.kept` different sequences, best first.

    Raises:
        SemipermError: no token is allowed, or the losses are not finite.
    """
    config = config or PromptSearch()
    if not len(allowed) or table.ndim != 2 or int(allowed.max()) >= len(table):
        raise SemipermError(
            f"{len(allowed)} allowed tokens of a table {tuple(table.shape)}; expected at least one, and ids below the"
            " number of rows"
        )
    seen: dict[tuple[int, ...], float] = {}

    def note(ids: Tensor, losses: Tensor, step: int) -> None:
        for row, loss in zip(ids.tolist(), losses.detach().float().tolist(), strict=True):
            if loss != loss or abs(loss) == float("inf"):
                raise SemipermError(f"the attacker's loss is {loss} at step {step}; expected a finite number")
            key = tuple(row)
            seen[key] = min(loss, seen.get(key, loss))
        if progress is not None:
            progress(step, min(seen.values()))

    generator = torch.Generator().manual_seed(config.seed)
    search = {"relaxed": _relaxed, "projected": _projected, "coordinate": _coordinate, "genetic": _genetic}[
        config.search
    ]
    search(loss_of, table.detach(), allowed.to(table.device), config, generator, note)
    ranked = sorted(seen.items(), key=lambda item: item[1])[: config.kept]
    return [Found(ids, loss) for ids, loss in ranked]


def _relaxed(loss_of, table, allowed, config, generator, note) -> None:
    few = table[allowed]  # (A, d): tokens that are not allowed have no weight at all
    start = torch.randn(config.tokens, len(allowed), generator=generator) * 0.1
    weights = start.to(table.device).requires_grad_()
    optimizer = torch.optim.Adam([weights], config.learning_rate or 0.01)
    for step in range(config.steps):
        with torch.enable_grad():
            soft = weights.softmax(dim=-1)
            chosen = soft.argmax(dim=-1)
            hard = torch.nn.functional.one_hot(chosen, len(allowed)).to(soft.dtype)
            embeddings = (hard + soft - soft.detach()).to(few.dtype) @ few
            losses = loss_of(allowed[chosen][None], embeddings[None], step)
            (weights.grad,) = torch.autograd.grad(losses.sum(), weights)
        note(allowed[chosen][None], losses, step)
        # Adam's steps do not depend on the size of the gradient, which softmax over thousands of tokens makes tiny
        optimizer.step()


def _drawn(allowed: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    """Allowed ids by chance."""
    return allowed[torch.randint(len(allowed), shape, generator=generator).to(allowed.device)]


def _gradient(loss_of, ids: Tensor, table: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Losses (1,) of K tokens, and the gradient (K, d) in their embeddings."""
    with torch.enable_grad():
        point = table[ids].clone().requires_grad_()
        losses = loss_of(ids[None], point[None], step)
        (grad,) = torch.autograd.grad(losses.sum(), point)
    return losses, grad


def _projected(loss_of, table, allowed, config, generator, note) -> None:
    few = table[allowed].float()
    lengths = few.square().sum(dim=1)
    free = table[_drawn(allowed, generator, config.tokens)].float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([free], config.learning_rate or 0.1, weight_decay=0.0)
    for step in range(config.steps):
        nearest = (lengths - 2 * free.detach() @ few.T).argmin(dim=1)
        ids = allowed[nearest]
        losses, grad = _gradient(loss_of, ids, table, step)
        free.grad = grad.float()
        note(ids[None], losses, step)
        optimizer.step()


def _coordinate(loss_of, table, allowed, config, generator, note) -> None:
    few, size = table[allowed].float(), config.population
    ids = _drawn(allowed, generator, config.tokens)
    rows = torch.arange(1, size, device=table.device)
    for step in range(config.steps):
        _, grad = _gradient(loss_of, ids, table, step)
        likely = (grad.float() @ few.T).topk(min(_LIKELY, len(allowed)), largest=False).indices  # (K, likely)
        places = torch.randint(config.tokens, (size - 1,), generator=generator).to(table.device)
        drawn = torch.randint(likely.shape[1], (size - 1,), generator=generator).to(table.device)
        people = ids.repeat(size, 1)  # the first is kept as it is
        people[rows, places] = allowed[likely[places, drawn]]
        with torch.no_grad():
            losses = loss_of(people, table[people], step)
        note(people, losses, step)
        ids = people[losses.argmin()]


@torch.no_grad()
def _genetic(loss_of, table, allowed, config, generator, note) -> None:
    size = config.population
    kept = max(2, int(size * _SURVIVORS))
    people = _drawn(allowed, generator, size, config.tokens)
    for step in range(config.steps):
        losses = loss_of(people, table[people], step)
        note(people, losses, step)
        parents = people[losses.argsort()[:kept]]
        count = size - kept
        pairs = torch.randint(kept, (2, count), generator=generator).to(table.device)
        cut = torch.randint(1, max(2, config.tokens), (count, 1), generator=generator).to(table.device)
        children = torch.where(
            torch.arange(config.tokens, device=cut.device) < cut, parents[pairs[0]], parents[pairs[1]]
        )
        changed = torch.rand(children.shape, generator=generator).to(table.device) < _MUTATED
        people = torch.cat([parents, torch.where(changed, _drawn(allowed, generator, *children.shape), children)])
