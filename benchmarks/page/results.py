"""docs/results.md, written from benchmarks/results/*.json: `semiperm bench results`. Needs nothing but the files.

Each section is a function of its file's content. A figure stands here only if it stands in a file; what a figure does
not say is written beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ...canvas.models import MODELS
from . import arena as results_arena
from . import checks
from . import kernels as results_kernels
from . import samplers as results_samplers
from . import token_merging as results_token_merging
from . import watermark as results_watermark
from . import worlds as results_worlds
from .tables import number, paragraphs, ratio, source, table

HEAD = """# Measured

Written by `semiperm bench results` from [benchmarks/results](../benchmarks/results); do not edit it by hand. A test
fails when this page and the files disagree.

**What these figures are.** Pictures and their verdicts come from small worlds
([their models](../canvas/weights/README.md)): the canvas, 13 objects and 8 styles on plain backgrounds, one object a
picture, drawn by a model of Stable Diffusion's architecture with 4.9 million parameters; and its second edition, of
scenes, look-alikes, hazards and words that no method is given, drawn by that architecture and by Stable Diffusion 3's.
Classifiers that know the world judge. They compare methods on the same prompts and seeds; they do not say how good a
method is on your checkpoint. Times were taken on two CPU cores; **no time has been measured on a GPU yet**. Values are
percent unless it says otherwise, with Wilson's 95 % interval in brackets; ratios are medians, with the middle half in
brackets.
"""


def canvas(figures: dict) -> str:
    """The embedded model: does it draw what is asked, does its noise survive, is the judge right."""
    samples, held, inversion = figures["samples"], figures["judge_heldout"], figures["inversion"]
    rows = [
        ("judge right on held-out renders: object, style", f"{number(held['object'])}, {number(held['style'])}"),
        (f"asked object found in {samples['n']} samples", number(samples["object"])),
        (f"asked style found in {samples['n']} samples", number(samples["style"])),
        ("hazard mark when asked, when not", f"{number(samples['hazard_when_asked'])}, "
         f"{number(samples['hazard_when_not_asked'])}"),
        (f"signs of the initial noise found again, mean of {inversion['n']} pictures",
         number(inversion["mean_sign_agreement"])),
        ("of these pictures, p < 1e-6", number(inversion["share_p_below_1e-6"])),
        ("round trip through the autoencoder, relative error", number(figures["autoencoder_roundtrip"])),
    ]  # fmt: skip
    weak = [f"{name} {number(value)}" for name, value in samples["per_object"].items() if value < 0.95]
    return paragraphs(
        "## The canvas",
        source("canvas.json", "semiperm canvas check --json benchmarks/results/canvas.json", figures),
        table(("what", "%"), rows),
        f"Limits: full captions that name every concept by its first word. Objects below 95: {', '.join(weak)}. Asked"
        " for by synonyms it is a little worse, stars above all.",
    )


def membranes(rows: list[dict]) -> str:
    """Time of a denoising step with membranes, and PEFT beside it."""
    names = {"membranes/cached": "cached (chosen for text projections)", "membranes/folded": "folded",
             "membranes/fused": "fused", "peft/adapters": "PEFT, as many adapters active"}  # fmt: skip
    return paragraphs(
        "## What membranes cost",
        source("membranes.json", "semiperm bench membranes --json benchmarks/results/membranes.json", rows),
        "A denoising step of the canvas in times the bare pipeline's, always-on membranes:",
        _by_count(rows, names),
        f"Limits: a step of this small model takes {rows[0]['ms']:.0f} ms, so that fixed costs of Python weigh more"
        " than in a large one. Ratios below 1 are noise.",
    )


def comfyui(rows: list[dict]) -> str:
    """The same in ComfyUI, a whole sampling run."""
    names = {"comfyui/always": "always on", "comfyui/probe": "gated, the gate open for the prompt"}
    return paragraphs(
        "## What membranes cost in ComfyUI",
        source("comfyui.json", "semiperm bench comfyui --json benchmarks/results/comfyui.json", rows),
        "A whole sampling run in times the bare graph's:",
        _by_count(rows, names),
        "Limits: as above; ComfyUI's Python has another torch than the other figures.",
    )


def _by_count(rows: Sequence[dict], names: dict[str, str]) -> str:
    counts = sorted({row["k"] for row in rows})
    found = {(row["name"], row["k"]): row for row in rows}
    cells = [(label, *(ratio(found[name, k]) for k in counts)) for name, label in names.items()]
    return table(("membranes", *map(str, counts)), cells)


def sampling(rows: list[dict]) -> str:
    """What negative token merging costs."""
    names = {"negative_token_merging/diversity": "batch apart",
             "negative_token_merging/reference": "away from a picture",
             "negtome/diversity": "released algorithm, batch apart",
             "negtome/reference": "released algorithm, away from a picture"}  # fmt: skip
    ends = sorted({row["window"][1] for row in rows})
    found = {(row["name"], row["window"][1]): row for row in rows}
    cells = [
        (label, *(ratio(found[name, end]) if (name, end) in found else "-" for end in ends))
        for name, label in names.items()
    ]
    return paragraphs(
        "## What negative token merging costs",
        source("sampling.json", "semiperm bench sampling --json benchmarks/results/sampling.json", rows),
        "A whole sampling run of the canvas (four images, 25 steps) in times the bare one's, by the end of the window:",
        table(("", *(f"until {end:g}" for end in ends)), cells),
        "Limits: the released algorithm is re-implemented from its formula; away from a picture it encodes the"
        " reference at every step.",
    )


SECTIONS: dict[str, Callable] = {
    "canvas": canvas,
    "membranes": membranes,
    "comfyui": comfyui,
    "negative_token_merging": results_token_merging.token_merging,
    "sampling": sampling,
    "watermark": results_watermark.watermark,
    "watermark_samplers": results_samplers.samplers,
    "kernels": results_kernels.kernels,
    "kernel_resources": results_kernels.kernel_resources,
    "kernel_model": results_kernels.kernel_model,
}


# section -> {stem: section of the other worlds that follows it}: of {world: content}, from files <stem>_<world>.json
WORLDS: dict[str, dict[str, Callable]] = {
    "canvas": {
        "canvas": checks.checks,
        "erasure": results_worlds.erasure,
        **{f"erasure_{count}": results_worlds.at_once(count) for count in (10, 30, 100)},
        "trained_10": results_worlds.at_once(10, trained=True),
        "arena": results_arena.arena,
    },
    "negative_token_merging": {
        "negative_token_merging": results_token_merging.worlds,
        "held_out": results_worlds.held_out,
        "guidance": results_worlds.guidance,
        "attacked": results_worlds.attacked,
        "guidance_cost": results_worlds.guidance_cost,
    },
    "watermark": {"watermark": results_worlds.watermark},
}


def page(results: dict[str, object]) -> str:
    """The whole page from the content of each file, by its stem; nothing of a world that has no file."""
    parts = [HEAD.rstrip()]
    for name, section in SECTIONS.items():
        parts.append(section(results[name]))
        for stem, of_worlds in WORLDS.get(name, {}).items():
            found = {world: results[f"{stem}_{world}"] for world in MODELS if f"{stem}_{world}" in results}
            parts.append(of_worlds(found) if found else "")
    return paragraphs(*parts) + "\n"


def read(folder: Path) -> dict[str, object]:
    """The content of the files that `page` needs, and of those of other worlds that are there.

    Raises:
        FileNotFoundError: one is missing.
    """
    more = [f"{stem}_{world}" for stems in WORLDS.values() for stem in stems for world in MODELS]
    names = [*SECTIONS, *(name for name in more if (folder / f"{name}.json").is_file())]
    return {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}
