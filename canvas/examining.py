"""`semiperm canvas check MODEL`: does a model of the second world draw what is asked, and does its noise survive?

Asks in public and in reserved words, apart; both judges answer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import language
from .judges import Judge, Verdict, relation
from .models import MODELS
from .scenes import RELATIONS, Scene, random_scene
from .sentences import describe

WORDINGS = ("public", "reserved")


@dataclass(frozen=True)
class Asked:
    """A prompt and the scene it describes."""

    prompt: str
    scene: Scene


def pairs(which: str, seed: int = 0, chatter: bool = False) -> list[Asked]:
    """Return a full caption for every object in every style, one object each."""
    rng = random.Random(f"pairs-{which}-{seed}-{chatter}")
    scenes = [
        random_scene(rng, objects=(name,), count=1, style=style, hazards=())
        for name in language.OBJECTS
        for style in language.STYLES
    ]
    return [Asked(describe(s, rng, which, complete=True, chatter=chatter), s) for s in scenes]


def scenes_of_two(which: str, n: int, seed: int = 0) -> list[Asked]:
    """Return captions of two different objects and their relation, every relation as often."""
    rng = random.Random(f"two-{which}-{seed}")
    out = []
    for i in range(n):
        scene = random_scene(
            rng, objects=tuple(rng.sample(language.OBJECTS, 2)), relation=RELATIONS[i % len(RELATIONS)], hazards=()
        )
        out.append(Asked(describe(scene, rng, which, complete=True, chatter=False), scene))
    return out


def counted(which: str, n: int, seed: int = 0) -> list[Asked]:
    """Return captions of two or three of a kind."""
    rng = random.Random(f"counted-{which}-{seed}")
    scenes = [random_scene(rng, objects=(rng.choice(language.OBJECTS),), count=2 + i % 2, hazards=()) for i in range(n)]
    return [Asked(describe(s, rng, which, complete=True, chatter=False), s) for s in scenes]


def with_hazard(name: str, which: str, n: int, implied: bool = False, seed: int = 0) -> list[Asked]:
    """Return captions of one object with a hazard, named or only implied."""
    rng = random.Random(f"hazard-{name}-{which}-{implied}-{seed}")
    out = []
    for _ in range(n):
        scene = random_scene(
            rng,
            objects=(rng.choice(language.OBJECTS),),
            count=1,
            hazards=(name,),
            implied=(name,) if implied else (),
        )
        out.append(Asked(describe(scene, rng, which, complete=True, chatter=False), scene))
    return out


def sample(
    pipe,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
    **settings,
) -> list[Image.Image]:
    """Sample a picture per prompt with the model's own steps and guidance; picture i has the noise of seed + i."""
    model = MODELS[pipe.semiperm_canvas]
    settings = {"num_inference_steps": model.steps, "guidance_scale": model.guidance_scale, **settings}
    images: list[Image.Image] = []
    for i in range(0, len(prompts), batch_size):
        part = list(prompts[i : i + batch_size])
        generators = [torch.Generator().manual_seed(seed + i + k) for k in range(len(part))]
        images += pipe(part, generator=generators, **settings).images
        if on_batch:
            on_batch(len(part))
    return images


def marks(asked: Sequence[Asked], verdict: Verdict) -> dict[str, np.ndarray]:
    """Return what came out as asked, per picture: "objects" (those and no other, in number), "colors", "style",
    "background", "hazards" and, where one was asked for, "relation" (else NaN)."""
    out: dict[str, list[float]] = {k: [] for k in ("objects", "colors", "style", "background", "hazards", "relation")}
    for i, item in enumerate(asked):
        scene, seen = item.scene, {thing.object: thing for thing in verdict.things[i]}
        wanted = {name: scene.objects.count(name) for name in scene.objects}
        out["objects"].append({name: thing.count for name, thing in seen.items()} == wanted)
        colored = [t for t in scene.things if t.object not in language.CHARACTERS]
        out["colors"].append(all(t.object in seen and seen[t.object].color == t.color for t in colored))
        out["style"].append(verdict.style[i] == scene.style)
        out["background"].append(verdict.background[i] == scene.background)
        out["hazards"].append(set(verdict.hazards[i]) == set(scene.hazards))
        if scene.relation:
            both = all(name in seen for name in scene.objects)
            found = both and relation(seen[scene.objects[0]], seen[scene.objects[1]]) == scene.relation
            out["relation"].append(float(found))
        else:
            out["relation"].append(float("nan"))
    return {k: np.array(v, float) for k, v in out.items()}


def lookalikes_kept(asked: Sequence[Asked], verdict: Verdict) -> float:
    """Return in what share of pictures of a look-alike its twin was not drawn in its place."""
    twin = {a: b for pair in language.LOOKALIKES for a, b in (pair, pair[::-1])}
    kept = []
    for i, item in enumerate(asked):
        for name in set(item.scene.objects) & set(twin):
            seen = verdict.objects(i)
            kept.append(name in seen and (twin[name] not in seen or twin[name] in item.scene.objects))
    return float(np.mean(kept))


def check(pipe, judges: dict[str, Judge], *, n: int = 100, wordings: Sequence[str] = WORDINGS) -> dict:
    """Return the figures of a model card, per wording and judge.

    Args:
        n: pictures of two things, of two or three of a kind, and (a quarter of it) of each hazard.
    """
    from rich.progress import Progress

    groups: dict[str, list[Asked]] = {}
    for which in wordings:
        groups[f"{which} pairs"] = pairs(which)
        groups[f"{which} two"] = scenes_of_two(which, n)
        groups[f"{which} counted"] = counted(which, n // 2)
        for name in language.HAZARDS:
            groups[f"{which} hazard {name}"] = with_hazard(name, which, n // 4)
    groups["public pairs among ordinary words"] = pairs("public", 1, chatter=True)
    for name in language.IMPLIED:
        groups[f"implied {name}"] = with_hazard(name, "public", n // 2, implied=True)
    rng = random.Random(0)
    groups["memorised"] = [
        Asked(describe(s, rng, "public", chatter=False), s)
        for m in language.MEMORISED
        for s in [Scene(memorised=m)] * 4
    ]
    out: dict[str, dict] = {name: {} for name in judges}
    with Progress() as progress:
        bar = progress.add_task("sampling", total=sum(map(len, groups.values())))
        for group, asked in groups.items():
            images = sample(pipe, [a.prompt for a in asked], on_batch=lambda k: progress.advance(bar, k))
            for name, judge in judges.items():
                verdict = judge(images)
                if group == "memorised":
                    found = [a.scene.memorised == m for a, m in zip(asked, verdict.memorised, strict=True)]
                    out[name][group] = {"n": len(asked), "found": float(np.mean(found))}
                    continue
                row = marks(asked, verdict)
                hazard = asked[0].scene.hazards
                figures = {k: float(np.nanmean(v)) for k, v in row.items() if not np.isnan(v).all()}
                if hazard:
                    figures["hazard drawn"] = float(np.mean([hazard[0] in h for h in verdict.hazards]))
                else:
                    figures["any hazard drawn"] = float(np.mean([bool(h) for h in verdict.hazards]))
                    figures["look-alikes kept"] = lookalikes_kept(asked, verdict)
                out[name][group] = {"n": len(asked), **figures}
    return out


def load_judges(folder: Path) -> dict[str, Judge]:
    """Load the judges that a folder of weights has.

    Raises: FileNotFoundError where it has none.
    """
    judges = {
        which: Judge.load(path, which)
        for which in ("first", "second")
        if (path := Path(folder) / f"judge-{which}.safetensors").exists()
    }
    if not judges:
        raise FileNotFoundError(
            f"{folder} has neither judge-first.safetensors nor judge-second.safetensors, so nothing says what a picture"
            f" shows; `semiperm canvas worlds export {folder}` writes them"
        )
    return judges
