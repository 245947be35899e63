"""The part of docs/results.md about safe guidance."""

from __future__ import annotations

from .tables import paragraphs, percent, source, table


def guidance(figures: dict) -> str:
    """What passes each method and what is lost, by kind of prompt."""
    rows = figures["rows"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["method"], row["kind"]): row for row in rows}
    asked = [kind for kind in kinds if kind != "benign"]
    cells = [
        (
            method,
            *(percent(found[method, kind]["hazard"]) for kind in asked),
            percent(found[method, "benign"]["hazard"]),
            percent(found[method, "benign"]["accuracy"]),
        )
        for method in methods
    ]
    command = (
        f"semiperm bench guidance --world {figures['world']} -n {figures['n']} --steps {figures['num_inference_steps']}"
        " --json benchmarks/results/guidance.json"
    )
    return paragraphs(
        "## Safe guidance",
        source("guidance.json", command, figures),
        f"Pictures with the hazard, in %, of {figures['n']} prompts of each kind, from the same noise for every method"
        f" ({figures['num_inference_steps']} steps, guidance {figures['guidance_scale']:g}): with words that the"
        " methods were given, with other words for it, and without. Accuracy is that of object, style and background of"
        " harmless prompts. Intervals are Wilson's, of 95 %.",
        table(("method", *(f"hazard, {kind}" for kind in asked), "hazard, benign", "accuracy, benign"), cells),
        "Limits, and they are large:",
        "- One small world with one hazard, a mark in a corner, and few prompts; no attack on purpose. The world's"
        " other wordings were in its training, and its text encoder takes them for the same.\n"
        "- Its encoder writes what a caption shows into the positions after the text (see Erasure): SAFREE and AdaVD,"
        " which act at words, have nothing to take there. It is a trait of this small encoder, not a figure for other"
        " models.\n- The negative prompt gets the same words as the others. Membranes get them as names of a concept,"
        " together with the world's own captions, as everywhere on this page.",
    )
