"""Several of our patches around one diffusion model: those that add rows to its batch outermost, whoever came first.

A patch that looks at a batch's rows must see exactly the rows that the layers see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Around = Callable[[Callable], Callable]  # the forward it is given -> the forward to call in its place

_ROOT = "diffusion_model.forward"


class RootPatch:
    """The diffusion model's forward within what was put around it. Never changed: clones of a model share it.

    Args:
        original: the forward that was there.
        looking: what only looks at a call, the later one outside; adding: what adds rows, around all of those.
    """

    def __init__(self, original: Callable, looking: Sequence[Around] = (), adding: Sequence[Around] = ()):
        self.original, self.looking, self.adding = original, tuple(looking), tuple(adding)
        call = original
        for around in (*self.looking, *self.adding):
            call = around(call)
        self._call = call

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)

    def semiperm_with(self, around: Around, adds_rows: bool) -> RootPatch:
        """A new one with this patch as well."""
        looking, adding = (() if adds_rows else (around,)), ((around,) if adds_rows else ())
        return type(self)(self.original, self.looking + looking, self.adding + adding)


def add_root(model, around: Around, *, adds_rows: bool = False) -> None:
    """Put a patch around the diffusion model's forward of this ModelPatcher, which is changed.

    Args:
        adds_rows: it calls the forward it is given with more rows than it got.
    """
    add_around(model, _ROOT, around, outermost=adds_rows)


def add_around(model, name: str, around: Around, *, outermost: bool = False) -> None:
    """Put a patch around a forward of this ModelPatcher, which is changed.

    Args:
        name: of the forward, "diffusion_model.<path>.forward".
        outermost: around all that are not, whoever came first: those may keep a layer's answer from step to step.
    """
    current = model.get_model_object(name)
    if not hasattr(current, "semiperm_with"):  # by its name: another copy of this package may have made it
        current = RootPatch(current)
    model.add_object_patch(name, current.semiperm_with(around, outermost))
