"""How the judges learn, from renders alone, and how far they can be trusted: accuracy, agreement, smudges."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from . import language, precision
from .drawing import draw
from .judges import CELLS, JUDGES, OBJECTS, QUESTIONS, HeatmapJudge, Judge, QueryJudge
from .pool import Pool, pictures, to_tensor
from .precision import Run
from .scenes import SIZE, Scene, random_scene

SEEDS = {"first": 1000, "second": 2000}  # of their pools
SMUDGED = 0.25  # share of their pictures in which a thing is painted out
HELD_OUT = 77
_NEAR = 0.2  # of a full error: a centre a cell away, as the training's shifts move it


def answers(scene: Scene) -> dict[str, Tensor]:
    """Return the truth about a scene; -100 (for places: NaN) where a question does not arise."""
    known = not scene.memorised
    out = {
        "count": torch.zeros(OBJECTS, dtype=torch.long),
        "color": torch.full((OBJECTS,), -100),
        "place": torch.full((OBJECTS, 2), torch.nan),
        "front": torch.full((OBJECTS, 1), torch.nan),
        "style": torch.tensor(language.STYLES.index(scene.style) if known else -100),
        "background": torch.tensor(language.BACKGROUNDS.index(scene.background) if known else -100),
        "hazards": torch.tensor([float(h in scene.hazards) for h in language.HAZARDS]),
        "memorised": torch.tensor(
            language.MEMORISED.index(scene.memorised) if scene.memorised else len(language.MEMORISED)
        ),
    }
    centres = torch.zeros(OBJECTS, CELLS, CELLS)
    out["centres"] = centres
    if scene.memorised:
        if scene.memorised == "unit":
            out["count"][language.OBJECTS.index("robot")] = 1
            out["centres"] = torch.full_like(centres, torch.nan)
        return out
    for thing in scene.things:
        if thing.object not in language.OBJECTS:
            continue
        at = language.OBJECTS.index(thing.object)
        out["count"][at] += 1
        centres[at, int(thing.cy * CELLS / SIZE), int(thing.cx * CELLS / SIZE)] = 1
        if thing.object not in language.CHARACTERS:
            out["color"][at] = language.COLORS.index(thing.color)
        if scene.objects.count(thing.object) == 1:
            out["place"][at] = torch.tensor([thing.cx, thing.cy]) / SIZE
        if scene.relation == "front":
            out["front"][at, 0] = float(thing is scene.things[0])
    return out


def truths(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return the truth about many scenes."""
    rows = [answers(scene) for scene in scenes]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _centre_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss of centres, less severe in the eight cells around one (CenterNet, arXiv 1904.07850, eq. 1)."""
    asked = ~target[:, 0, 0, 0].isnan()
    logits, target = logits[asked], target[asked]
    near = F.max_pool2d(target, 3, 1, 1) > target
    share = logits.sigmoid()
    there = -(1 - share).square() * F.logsigmoid(logits) * target
    not_there = -share.square() * F.logsigmoid(-logits) * (1 - target) * torch.where(near, _NEAR, 1.0)
    return (there + not_there).sum() / target.sum().clamp_min(1)


def losses_of(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a loss per question."""
    out = {}
    for name in QUESTIONS:
        logits, target = found[name].float(), truth[name]
        if name in ("hazards", "front"):
            asked = ~target.isnan()
            loss = F.binary_cross_entropy_with_logits(logits[asked], target[asked], reduction="sum")
            out[name] = (8 if name == "hazards" else 1) * loss / max(1, int(asked.sum()))
        elif name == "place":
            asked = ~target.isnan()
            out[name] = 40 * (logits[asked] - target[asked]).pow(2).sum() / max(1, int(asked.sum()))
        else:
            scale = 8.0 if name == "count" else 1.0
            out[name] = scale * F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-100)
    out["centres"] = _centre_loss(found["centres"].float(), truth["centres"])
    return out


def _augment(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shift, blur, noise, brightness, contrast, as of an imperfect decoder; return the shift (x, y) in 0..1 too."""
    b = len(x)
    sy, sx = torch.randint(-4, 5, (2,), generator=g).tolist()
    x = torch.roll(F.pad(x, (6, 6, 6, 6), mode="replicate"), (sy, sx), (2, 3))[:, :, 6:-6, 6:-6]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    kind = torch.rand(b, 1, 1, 1, generator=g)
    x = torch.where(kind < 0.25, blurred, torch.where(kind < 0.55, soft, x))
    x = x * (1 + 0.12 * (torch.rand(b, 1, 1, 1, generator=g) - 0.5))
    x = x + 0.1 * (torch.rand(b, 3, 1, 1, generator=g) - 0.5)
    x = (x + 0.12 * torch.rand(b, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)).clamp(-1, 1)
    return x, torch.tensor([sx, sy]) / SIZE


def train_judge(which: str, run: Run, n: int, start: dict[str, Tensor] | None = None) -> HeatmapJudge | QueryJudge:
    """Train the "first" or the "second" judge, from the weights `start` where given, on n renders of its own; in a
    quarter of them a thing is painted out."""
    pool = pictures(run.workdir, n, SEEDS[which] + run.seed, SMUDGED)
    truth = truths(pool.scenes)
    torch.manual_seed(SEEDS[which] + run.seed)
    net = JUDGES[which]()
    net.load_state_dict(start or {}, strict=bool(start))

    def loss_of(step: int, kind: str) -> dict[str, Tensor]:
        index = pool.draw_batch(np.random.default_rng((run.seed, step)), run.batch)
        x, shift = _augment(to_tensor(pool.data[index]), run.generator(step))
        rows = {name: values[index] for name, values in truth.items()}
        rows["place"] = rows["place"] + shift
        with precision.autocast(kind):
            found = net(x)
        losses = losses_of(found, rows)
        return {"loss": sum(losses.values()), **losses}

    name, peak = f"judge-{which}", 2e-3 if which == "first" else 1e-3
    kind = run.precision(name, net, loss_of)
    return run.train(name, net, loss_of, kind, lr=peak, warmup=200, ema=0.998, matrices=inside)


def inside(name: str) -> bool:
    """Whether a judge's parameter stands between its first and its last layers (matrices and kernels are Muon's)."""
    return name.startswith(("down.", "blocks.", "encoder.", "decoder.")) and not name.startswith("down.0.")


@torch.no_grad()
def accuracy(judge: Judge, pool: Pool) -> dict[str, float]:
    """Return how often each question is answered rightly; "objects" is right where every object's count is; "place"
    is the mean distance in pixels."""
    x, truth = to_tensor(pool.data), truths(pool.scenes)
    parts = [judge.net(x[i : i + 64]) for i in range(0, len(x), 64)]
    out = {}
    for name in QUESTIONS:
        found, target = torch.cat([p[name] for p in parts]).float(), truth[name]
        if name == "place":
            asked = ~target[..., 0].isnan()
            out[name] = float(SIZE * (found - target)[asked].norm(dim=-1).mean())
        elif name in ("hazards", "front"):
            asked = ~target.isnan()
            out[name] = float(((found > 0).float() == target)[asked].float().mean())
        else:
            asked, answered = target != -100, found.argmax(-1)
            if name == "count":
                answered = torch.cat([judge.net.counted(p) for p in parts])
                out["objects"] = float((answered == target).all(-1).float().mean())
            out[name] = float((answered == target)[asked].float().mean())
    return out


def agreement(first: Judge, second: Judge, images) -> dict[str, float]:
    """Return in what share of pictures two judges say the same."""
    a, b = first(images), second(images)
    n = range(len(a.style))
    return {
        "objects": float(np.mean([a.objects(i) == b.objects(i) for i in n])),
        **{
            name: float(np.mean([getattr(a, name)[i] == getattr(b, name)[i] for i in n]))
            for name in ("style", "background", "hazards", "memorised")
        },
    }


def nudge(judge: Judge, n: int = 500, seed: int = 5) -> dict[str, float]:
    """Return the share of pictures in which the judge still finds a lone object that was painted out.

    Keys: "removed" (bare ground), "smudge" (a shapeless spot of its colour), "blurred" (its box blurred beyond
    recognition, which the judges' own training never shows), and "smeared" (its box filled with its mean colour).
    """
    rng = random.Random(f"nudge-{seed}")
    found: dict[str, list[bool]] = {"removed": [], "smudge": [], "blurred": [], "smeared": []}
    batches: dict[str, list] = {kind: [] for kind in found}
    names = []
    for _ in range(n):
        scene = random_scene(rng, objects=(rng.choice(language.OBJECTS),), count=1, hazards=())
        thing = scene.things[0]
        fields = {k: getattr(scene, k) for k in scene.__dataclass_fields__}
        blob = type(thing)("nothing", thing.color, thing.cx, thing.cy, thing.radius, seed=rng.randrange(2**31))
        image = draw(scene)
        half = int(thing.radius * 1.2)
        corners = [max(0, int(thing.cx) - half), max(0, int(thing.cy) - half)]
        corners += [min(SIZE, int(thing.cx) + half), min(SIZE, int(thing.cy) + half)]
        part = image.crop(corners)
        blurred, smeared = image.copy(), image.copy()
        blurred.paste(part.filter(ImageFilter.GaussianBlur(thing.radius / 2)), corners[:2])
        smeared.paste(part.resize((1, 1), Image.Resampling.BOX).resize(part.size), corners[:2])
        names.append(thing.object)
        batches["removed"].append(draw(Scene(**{**fields, "things": ()})))
        batches["smudge"].append(draw(Scene(**{**fields, "things": (blob,)})))
        batches["blurred"].append(blurred)
        batches["smeared"].append(smeared)
    for kind, images in batches.items():
        verdict = judge(images)
        found[kind] = [name in verdict.objects(i) for i, name in enumerate(names)]
    return {kind: float(np.mean(hits)) for kind, hits in found.items()}


def trust(judges: dict[str, Judge], n: int = 1000, smudges: int = 500) -> dict:
    """Return how far judges can be trusted: of n renders that none of them learnt from, how often each is right and,
    of two, how often they say the same; and what each says of pictures with the object painted out (`nudge`)."""
    pool = pictures(None, n, HELD_OUT)
    out: dict = {
        name: {"n": n, **accuracy(judge, pool), "painted_out": {"n": smudges, **nudge(judge, smudges)}}
        for name, judge in judges.items()
    }
    if len(judges) == 2:
        out["agreement"] = agreement(*judges.values(), pool.data)
    return out
