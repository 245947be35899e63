"""A model that draws at once, and judges of its pictures, for the benchmarks of negative token merging."""

from types import SimpleNamespace

import torch
from semiperm.benchmarks.token_merging import look
from semiperm.canvas.editions import WORLDS
from semiperm.canvas.world import Shown, Sight


class Painter:
    device, dtype, strength = torch.device("cpu"), torch.float32, 0.0

    def __init__(self):
        self.calls = []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompts, **call):
        self.calls.append((prompts, call))
        return SimpleNamespace(images=torch.full((len(prompts), 3, 4, 4), 1 - self.strength / 4))


def painted(monkeypatch):
    """Every world's model and judges, stood in for: for a fixture."""
    pipe = Painter()

    def see(images):
        alike = images[:, 0, 0, 0] if isinstance(images, torch.Tensor) else torch.ones(len(images))
        features = torch.stack([alike, 1 - alike], 1) if len(images) < 100 else torch.full((len(images), 2), 0.5)
        return Sight([Shown(("quibble", "ghost"), "flat", "sand")] * len(images), features)

    def applied(pipe, config):
        pipe.strength = config.strength
        return SimpleNamespace(remove=lambda: setattr(pipe, "strength", 0.0))

    monkeypatch.setattr(look, "load_pipeline", lambda name: pipe)
    monkeypatch.setattr(look, "apply_negative_token_merging", applied)
    for cls in {type(world) for world in WORLDS.values()}:
        monkeypatch.setattr(cls, "judges", lambda self: {"first": see, "second": see})
    return pipe
