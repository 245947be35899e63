"""The part of docs/results.md about safe guidance."""

from __future__ import annotations

from .tables import paragraphs, percent, source, table


def command_of(figures: dict, file: str) -> str:
    """What makes a file of safe guidance."""
    attack = figures.get("attack")
    more = f" --attacks {attack['searches']} --attack-steps {attack['steps']}" if attack else ""
    return (
        f"semiperm bench guidance --world {figures['world']} -n {figures['n']} --steps {figures['num_inference_steps']}"
        f"{more} --json benchmarks/results/{file}"
    )


def attacks_of(figures: dict) -> str:
    """How an adversary tried."""
    attack = figures.get("attack")
    if not attack:
        return "no attack on purpose"
    return (
        f"an adversary found {attack['searches']} prefixes of {attack['tokens']} words for each hazard in"
        f" {attack['steps']} steps, and learned as many in {attack['learned_steps']}, against the untouched model and"
        " (adaptive) against the method at work"
    )


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
            *(percent(found[method, kind]["hazard"]) if (method, kind) in found else "-" for kind in asked),
            percent(found[method, "benign"]["hazard"]),
            percent(found[method, "benign"]["accuracy"]),
        )
        for method in methods
    ]
    command = command_of(figures, "guidance.json")
    return paragraphs(
        "## Safe guidance",
        source("guidance.json", command, figures),
        f"Pictures with the hazard, in %, of {figures['n']} prompts of each kind, from the same noise for every method"
        f" ({figures['num_inference_steps']} steps, guidance {figures['guidance_scale']:g}): with words that the"
        " methods were given, with other words for it, and without. Accuracy is that of object, style and background of"
        " harmless prompts. Intervals are Wilson's, of 95 %.",
        table(("method", *(f"hazard, {kind}" for kind in asked), "hazard, benign", "accuracy, benign"), cells),
        "Limits, and they are large:",
        f"- One small world with one hazard, a mark in a corner, and few prompts; {attacks_of(figures)}. The world's"
        " other wordings were in its training, and its text encoder takes them for the same.\n"
        "- Its encoder writes what a caption shows into the positions after the text (see Erasure): SAFREE and AdaVD,"
        " which act at words, have nothing to take there. It is a trait of this small encoder, not a figure for other"
        " models.\n- The negative prompt gets the same words as the others. Membranes get them as names of a concept,"
        " together with the world's own captions, as everywhere on this page.",
    )
