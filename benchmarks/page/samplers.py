"""The section of docs/results.md on samplers and the mark, from the rows of watermark_samplers.json."""

from __future__ import annotations

from collections.abc import Sequence

from .tables import paragraphs, source, table

FACES = {"diffusers": "diffusers", "comfyui": "ComfyUI"}


def samplers(rows: list[dict]) -> str:
    """A table a face: sampler by steps and guidance."""
    settings = sorted({(row["steps"], row["guidance"]) for row in rows})
    parts = []
    for face, title in FACES.items():
        if not (some := [row for row in rows if row["face"] == face]):
            parts.append(f"### {title}\n\nNot measured: give the command `--comfyui` with a folder of ComfyUI.")
            continue
        cells = [
            (_name(rows_of[0]), *(_cell(rows_of, setting) for setting in settings))
            for name in dict.fromkeys(map(_name, some))
            for rows_of in [[row for row in some if _name(row) == name]]
        ]
        heads = (f"{steps} steps, {guidance:g}" for steps, guidance in settings)
        parts += [f"### {title}", table(("sampler", *heads), cells)]
    count, shape = min(row["n"] for row in rows), "x".join(map(str, rows[0]["shape"]))
    return paragraphs(
        "## Samplers and the mark",
        source(
            "watermark_samplers.json",
            "semiperm bench watermark --part samplers --comfyui ~/comfy/ComfyUI --json"
            " benchmarks/results/watermark_samplers.json",
            rows,
        ),
        "Signed pictures of the canvas, by sampler, steps and guidance: how many were found at p < 1e-6 of those that"
        " were drawn, and the median picture's log10 p in brackets. What adds noise of its own was drawn in 25 steps at"
        " guidance 4 alone. [methods/watermark/samplers.py](../methods/watermark/samplers.py) accepts, warns and"
        " refuses by this table, in both faces.",
        *parts,
        f"Limits: {count} pictures a setting, which shows samplers that lose marks, and not how many; latents of"
        f" {shape}, which are the smallest that can be signed: larger ones lose less. Samplers that are not listed were"
        " not measured and are refused. ComfyUI's schedule is `normal`, diffusers' are the schedulers' own defaults."
        " Flow models were not measured.",
    )


def _name(row: dict) -> str:
    return " ".join([row["sampler"], *(f"{name}={value}" for name, value in row["options"].items())])


def _cell(rows: Sequence[dict], setting: tuple) -> str:
    found = [row for row in rows if (row["steps"], row["guidance"]) == setting]
    return f"{found[0]['found']} of {found[0]['n']} ({found[0]['log10_p']:.0f})" if found else "-"
