"""How the figures of safe guidance were made, for docs/results.md."""

from __future__ import annotations


def command_of(figures: dict, file: str) -> str:
    """What makes a file of safe guidance."""
    attack = figures.get("attack")
    more = f" --attacks {attack['searches']} --attack-steps {attack['learned_steps']}" if attack else ""
    more += "".join(f' --method "{name}"' for name in figures["methods"])
    return (
        f"semiperm bench guidance --world {figures['world']} -n {figures['n']} --steps {figures['num_inference_steps']}"
        f"{more} --json benchmarks/results/{file}"
    )


def attacks_of(figures: dict) -> str:
    """How an adversary tried."""
    attack = figures.get("attack")
    if not attack:
        return "no attack on purpose"
    prefixes = f"{attack['searches']} prefix{'es' * (attack['searches'] > 1)} of {attack['tokens']} words"
    return (
        f"an adversary found {prefixes} for each hazard in {attack['steps']} steps, and learned as many in"
        f" {attack['learned_steps']}, against the untouched model and (adaptive) against the method at work"
    )
