"""UCE: a ridge regression of what attention reads.

    W* = (lambda W + s sum W g e^T + p sum W c c^T) (lambda I + s sum e e^T + p sum c c^T)^-1

e are the concepts' bare phrasings, g the empty prompt, c the names to keep, each by its last token; lambda = .5,
s = p = 1. It acts in every row of a batch, as a weight does.

Source: arXiv 2308.14761, equation 7. We differ: the edit is applied as the membrane that it equals
(methods/membranes/uce.py), and undone with it; where a model reads T5's text, too, its last token is a further e.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..erasure.methods import Told, applied
from .shared import fitted, textbook_uce


def erase(pipe, told: Told) -> AbstractContextManager[dict]:
    membranes = fitted(told, "uce", {}, lambda: textbook_uce(pipe, told.phrases, told.others))
    return applied(pipe, membranes, "always", negative_rows=True)
