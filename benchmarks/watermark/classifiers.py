"""Classifiers that try to tell marked from plain noise: of means, of pairs of elements, of neighbourhoods, and of known
latents: pictures of one key can be linked, see docs/watermark.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["CLASSIFIERS", "hits"]

_LEAST = 6000  # latents, repeated or not, that a network sees


def hits(classifier: str, marked: Tensor, plain: Tensor, train: int) -> tuple[int, int]:
    """Train on the first `train` latents of each kind; (right, all) answers on the others.

    Args:
        classifier: a name out of CLASSIFIERS. marked, plain: (B, C, H, W), as many of each.
    """
    kinds = marked.float(), plain.float()
    x, y = torch.cat([kind[:train] for kind in kinds]), torch.cat([torch.ones(train), torch.zeros(train)])
    score = CLASSIFIERS[classifier](x, y)
    # Where nothing is to be learned, scores are fitted to chance, by the same amount on both sides of their middle.
    middle = sum(torch.cat([score(part) for part in kind[:train].split(500)]).mean() for kind in kinds) / 2
    right = 0
    for kind, sign in zip(kinds, (1, -1), strict=True):
        right += sum(int((sign * (score(part) - middle) > 0).sum()) for part in kind[train:].split(500))
    return right, sum(len(kind) - train for kind in kinds)


def _logistic(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Linear in the elements: finds a mark that leaves the mean of some element."""
    return _trained(nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 1)), x, y)


def _convolutional(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Two convolutions and a linear layer over their places."""
    channels, height, width = x.shape[1:]
    places = -(-height // 2) * -(-width // 2)
    layers = nn.Conv2d(channels, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.ReLU()
    return _trained(nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * places, 1)), x, y)


def _pairs(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """z^T (S_marked - S_plain) z with the second moments S of the training set: finds elements tied to each other."""
    flat = x.flatten(1)
    marked, plain = flat[y > 0], flat[y == 0]
    difference = marked.T @ marked / len(marked) - plain.T @ plain / len(plain)

    def score(z: Tensor) -> Tensor:
        z = z.flatten(1)
        return (z @ difference * z).sum(1)

    return score


def _nearest(x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The largest agreement of signs, or disagreement, with any marked latent that is known: of those that share a
    pattern, half have it the other way round."""
    known = x[y > 0].flatten(1).sign()

    def score(z: Tensor) -> Tensor:
        agreement = (z.flatten(1).sign() @ known.T).abs()
        agreement[agreement == known.shape[1]] = 0  # itself, where what was learned from is asked
        return agreement.amax(1)

    return score


def _trained(model: nn.Sequential, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            start = torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5
            weight.copy_(start if weight.ndim > 1 else torch.zeros_like(weight))
        model[-1].weight.zero_()  # it need not unlearn what it was born with
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(max(5, _LEAST // len(x))):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[rows])[:, 0], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def score(z: Tensor) -> Tensor:
        return model(z)[:, 0]

    return score


CLASSIFIERS = {"logistic": _logistic, "pairs": _pairs, "convolutional": _convolutional, "nearest": _nearest}
