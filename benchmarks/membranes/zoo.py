"""Makes the zoo of an embedded model (`methods.membranes.zoo`): every concept from words, by picture, and trained.

Each membrane is made of the plain name and the phrasings that methods may know, and measured on words that no method
knows, beside the untouched model on the same prompts and seeds. A membrane whose card says that it was made of these
weights in this way is left as it is; what stopped in the middle goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from ...canvas.world import PUBLIC, RESERVED, World
from ...methods.errors import MembraneError
from ...methods.membranes.file import load_membranes, save_membranes
from ...methods.membranes.types import Membranes
from ...methods.membranes.visual_fit import VisualConfig
from ...methods.membranes.zoo import KINDS, file_digest, read_card, write_card, zoo_name
from ...methods.training.config import TrainingConfig
from ..erasure.cases import built_in_cases
from ..erasure.evaluate import evaluate
from ..erasure.methods import applied
from ..store import Store, digest
from ..timing import machine, versions

__all__ = ["ZooConfig", "make_zoo"]

GATES = {"text": "auto", "image": "auto", "trained": "auto"}  # of the figures: as people get it who set nothing


@dataclass(frozen=True)
class ZooConfig:
    """What is made.

    Args:
        concepts: of the world; () is every one that its suite erases alone.
        kinds: of `KINDS`.
        each: pictures that ask for the concept, and as many that do not; 0 measures nothing.
        training: of the trained ones. visual: of the image side; its guidance scale is the model's.

    Raises:
        MembraneError: another kind, or a negative number of pictures.
    """

    concepts: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    each: int = 24
    training: TrainingConfig = field(default_factory=TrainingConfig)
    visual: VisualConfig = field(default_factory=VisualConfig)

    def __post_init__(self):
        if not self.kinds or not set(self.kinds) <= set(KINDS) or self.each < 0:
            raise MembraneError(
                f"kinds {', '.join(self.kinds) or '(none)'} with {self.each} pictures; expected some of"
                f" {', '.join(KINDS)}, and 0 pictures or more"
            )


def make_zoo(
    pipe,
    world: World,
    folder: str | Path,
    config: ZooConfig | None = None,
    *,
    work: str | Path | None = None,
    command: str = "semiperm zoo make",
    progress: Callable[[str], None] | None = None,
    **sampling,
) -> list[Path]:
    """Make what is missing; returns the membrane files, in the order of concepts and kinds.

    Args:
        pipe: the world's model, untouched. folder: of the zoo; a folder of the model's name is made in it.
        work: folder of what unfinished trainings and measurements go on from; None keeps nothing.
        progress: called with a line about each membrane.
        sampling: arguments of the pipeline, where the pictures of the figures are to be drawn otherwise.

    Raises:
        MembraneError: an unknown concept, or one that is no object, style or hazard.
    """
    config = config or ZooConfig()
    asked = config.concepts or tuple(names[0] for names in world.suite if len(names) == 1)
    names = [world.resolve(name)[0] for name in asked]
    home, halfway = Path(folder) / world.name, None if work is None else Path(work) / world.name
    weights, found = digest(*world.files()), []
    cases = built_in_cases(world, words=_asking(world)) if config.each else []
    judges = world.judges() if config.each else {}
    for name in names:
        for kind in config.kinds:
            path = home / f"{zoo_name(name, kind)}.safetensors"
            found.append(path)
            how = _recipe(kind, config, weights, sampling)
            if _is_made(path, how):
                continue
            start = perf_counter()
            (membrane,) = _made(pipe, world, name, kind, config, halfway and halfway / path.stem)
            save_membranes(membrane, path)
            seconds, rows = perf_counter() - start, []
            if config.each:
                (loaded,) = load_membranes(path)  # figures are of the file
                kept = Store(halfway and halfway / f"{path.stem}.jsonl", "zoo", [how, digest(path)])
                rows = evaluate(
                    pipe, world, judges, cases, [(name,)],
                    methods={f"zoo/{kind}": partial(_at_work, Membranes(loaded), GATES[kind])},
                    words=_asking(world), each=config.each, finished=kept, **sampling,
                )["rows"]  # fmt: skip
            about = {
                "model": world.name,
                "kind": kind,
                "recipe": how,
                "command": f"{command} --world {world.name}",
                "seconds": round(seconds, 1),
                "machine": machine(pipe.device, pipe.dtype),
                "versions": versions("torch", "diffusers"),
            }
            write_card(path, membrane, about, rows)
            if progress is not None:
                progress(f"{world.name}/{path.stem}: {path.stat().st_size / 1024:.0f} KiB in {seconds:.1f} s")
    return found


def _made(pipe, world: World, name: str, kind: str, config: ZooConfig, work: Path | None) -> Membranes:
    from ...pipelines.membranes.erase import erase_concepts
    from ...pipelines.training.train import train_membranes

    said = "|".join(world.phrases(name))
    if kind == "trained":
        return train_membranes(pipe, said, config=config.training, workdir=work)
    if kind == "image":
        visual = replace(
            config.visual, sampling={"guidance_scale": world.guidance_scale} | dict(config.visual.sampling)
        )
        return erase_concepts(pipe, said, side="image", visual=visual)
    return erase_concepts(pipe, said)


@contextlib.contextmanager
def _at_work(membranes: Membranes, gate: str, pipe, told) -> Iterator[dict]:
    with applied(pipe, membranes, gate) as extra:
        yield extra


def _asking(world: World) -> str:
    """The words of `World.askings` that no method knows."""
    return next(words for words, asking in world.askings.items() if asking.wording == RESERVED)


def _recipe(kind: str, config: ZooConfig, weights: str, sampling: dict[str, Any]) -> str:
    """What a membrane of a kind and its figures come from, beside the concept and the code."""
    own = {"text": None, "image": asdict(config.visual), "trained": asdict(config.training)}[kind]
    return digest(weights, kind, own, config.each, sampling, PUBLIC)


def _is_made(path: Path, recipe: str) -> bool:
    try:
        card: dict = read_card(path)
    except MembraneError:
        return False
    return card.get("recipe") == recipe and path.exists() and card.get("sha256") == file_digest(path)
