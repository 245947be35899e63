"""Other people's erasers, from their formulas, told exactly what ours are: `RIVALS[name](pipe, told)`.

Each is a file of this folder with a function `erase(pipe, told, **options)`, whose docstring has the formula, its
source and where we differ. Every edit is undone, bit for bit, on leaving the context; a method that is not made for a
model's architecture raises a `SemipermError`.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from ..erasure.methods import Told

WORDS = "names, synonyms"
LISTED = "names, synonyms, other names to keep"
CAPTIONS = "names, synonyms; general captions"


@dataclass(frozen=True)
class Rival:
    """One way to erase.

    Args:
        name: in RIVALS. title: for people. source: where its formula stands.
        told: what it is told of `Told`, and of the package's general captions.
        kind: "closed form", "trained" or "at work".
        models: what it is made for: "UNet", "CLIP" (a model with a CLIP text encoder) or "all".
        file: of this folder. options: of its `erase`.
    """

    name: str
    title: str
    source: str
    told: str
    kind: str
    models: str
    file: str
    options: dict = field(default_factory=dict)

    def __call__(self, pipe, told: Told, **options) -> AbstractContextManager[dict]:
        """Erase while the block runs; the dictionary has further arguments for the pipeline's call."""
        module = importlib.import_module(f".{self.file}", __name__)
        return module.erase(pipe, told, **{**self.options, **options})


def _arxiv(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"


_ROWS = (
    Rival("spm", "SPM as released", _arxiv("2312.16145"), CAPTIONS, "trained", "all", "spm"),
    Rival("uce", "UCE", _arxiv("2308.14761"), LISTED, "closed form", "all", "uce"),
    Rival("rece", "RECE", _arxiv("2407.12383"), LISTED, "closed form", "UNet", "rece"),
    Rival("speed", "SPEED", _arxiv("2503.07392"), LISTED, "closed form", "UNet", "speed"),
    Rival("dp", "DP (double projections)", _arxiv("2604.10032"), LISTED, "closed form", "all", "double_projections"),
    Rival("gloce", "GLoCE", _arxiv("2503.12356"), CAPTIONS, "closed form", "UNet", "gloce"),
    Rival("casteer", "CASteer", _arxiv("2503.09630"), CAPTIONS, "closed form", "UNet", "casteer"),
    Rival("neurons", "NeMo (neuron mask)", _arxiv("2406.02366"), CAPTIONS, "closed form", "UNet", "neurons"),
    Rival("hirm", "HiRM-like", _arxiv("2602.19631"), WORDS, "trained", "CLIP", "hirm"),
    Rival("few_shot", "few-shot unlearning", _arxiv("2405.07288"), CAPTIONS, "trained", "CLIP", "few_shot"),
    Rival("advunlearn", "AdvUnlearn-style", _arxiv("2405.15234"), CAPTIONS, "trained", "CLIP", "advunlearn"),
    Rival("esd_x", "ESD-x", _arxiv("2303.07345"), WORDS, "trained", "UNet", "esd", {"part": "x"}),
    Rival("esd_u", "ESD-u", _arxiv("2303.07345"), WORDS, "trained", "UNet", "esd", {"part": "u"}),
    Rival("adavd", "AdaVD", _arxiv("2412.06143"), WORDS, "at work", "all", "adavd"),
    Rival("safree", "SAFREE", _arxiv("2410.12761"), WORDS, "at work", "all", "safree"),
    Rival("negative_prompt", "negative prompt", "practice", WORDS, "at work", "all", "negative_prompt"),
)  # fmt: skip
RIVALS: dict[str, Rival] = {row.name: row for row in _ROWS}


def table() -> str:
    """The rivals as the table of docs/methods.md."""
    lines = ["| rival | source | told | how | models |", "|---|---|---|---|---|"]
    for row in _ROWS:
        title = f"[{row.title}](../benchmarks/rivals/{row.file}.py)"
        lines.append(f"| {title} | {row.source} | {row.told} | {row.kind} | {row.models} |")
    return "\n".join(lines)
