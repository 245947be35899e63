"""The embedded worlds by the names of their models."""

from .first_edition import FirstEdition
from .models import MODELS
from .second_edition import SecondEdition
from .world import World

_EDITIONS = {1: FirstEdition, 2: SecondEdition}
WORLDS: dict[str, World] = {name: _EDITIONS[model.edition](name) for name, model in MODELS.items()}


def world_of(name: str) -> World:
    """The world of a model's name; ValueError if there is none."""
    if name not in WORLDS:
        raise ValueError(f"no embedded world is called {name!r}; choose from {', '.join(WORLDS)}")
    return WORLDS[name]
