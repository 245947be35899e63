"""SPM as released: one-dimensional adapters by latent anchoring, at work with squared gates and cross terms.

    L = |e_M(x, c) - [e("") - (e(c) - e(""))]|^2 + 1000 mean_a |e_M(x, a) - e(x, a)|^2,   rank 1, from zero
    y = W x + (sum_i gamma_i u_i) ((sum_j gamma_j d_j) x)     gamma by flattened cosine and shared tokens

Source: SPM (arXiv 2312.16145), training as in its section 3.2, inference as in its released code: gate "official".
3000 steps, AdamW at 1e-4, two anchors that count (of four), pictures of 30 steps at guidance 3, the bare phrasings.
We differ: it is trained by the package (pipelines/training), whose pictures go one sampler's step with each step of the
optimiser, and whose anchors are drawn where text is. The released code draws them from an isotropic Gaussian.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ...methods.membranes.types import Membranes
from ...methods.training.config import TrainingConfig
from ...pipelines.training.train import train_membranes
from ..erasure.methods import Told, applied
from .shared import fitted


def erase(pipe, told: Told, steps: int = 3000, seed: int = 0) -> AbstractContextManager[dict]:
    """Erase by SPM.

    Args:
        steps: of training, >= 1.
    """
    options = {"steps": steps, "seed": seed}
    membranes = fitted(told, "spm", options, lambda: _fit(pipe, told, **options))
    return applied(pipe, membranes, "official", negative_rows=True)


def _fit(pipe, told: Told, steps: int, seed: int) -> Membranes:
    config = TrainingConfig(
        steps=steps,
        learning_rate=1e-4,
        warmup=min(500, steps // 6),
        rank=1,
        layers="all",
        warm_start="none",
        push=1.0,
        anchor_weight=1000.0,
        anchors=2,
        anchor_source="latent",
        batch_size=1,
        sampling_steps=30,
        sampling_guidance=3.0,
        validate_every=0,
        seed=seed,
    )
    concepts = ["|".join(own) for own in told.words.values()]
    return train_membranes(pipe, concepts, templates=["{}"], config=config)
