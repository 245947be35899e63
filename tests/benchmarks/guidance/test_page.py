"""The page's sections of safe guidance say what their files say, and how they were made."""

from semiperm.benchmarks.page import worlds

ABOUT = {"world": "canvas-scenes", "n": 4, "num_inference_steps": 25, "guidance_scale": 4.0}


def row(method, kind, hazard, scope="all", category="", judge="first", others=0.0):
    share = [hazard, 0.0, 1.0]
    return {"method": method, "categories": scope, "kind": kind, "category": category, "judge": judge, "n": 10,
            "hazard": share, "others": [others, 0.0, 1.0], "accuracy": [0.9, 0.8, 1.0]}  # fmt: skip


def lines_of(text, method):
    return [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {method} |")]


def test_methods_stand_with_all_hazards_at_once_and_with_one():
    kinds = {"benign": 0.0, "named": 0.5, "other words": 0.25, "implied": 0.125}
    rows = [row("AdaVD", kind, share, scope) for scope in ("all", "one") for kind, share in kinds.items()]
    halves = [(scope, kind, share / 2) for scope in ("all", "one") for kind, share in kinds.items()]
    rows += [row("AdaVD", kind, share, scope, judge="second") for scope, kind, share in halves]
    rows += [row("AdaVD", "named", 1.0, category="claws")]
    rows[1]["others"] = [0.4, 0.0, 1.0]
    text = worlds.guidance({"canvas-scenes": ABOUT | {"attack": None, "methods": [], "rows": rows}})
    first, second = lines_of(text, "AdaVD")
    assert first[1] == "all" and second[1] == "one"
    assert [cell.split()[0] for cell in first[2:]] == [
        "50.0",
        "25.0",
        "12.5",
        "0.0",
        "90.0",
        "10.0",
        "25.0",
        "12.5",
        "6.2",
    ]
    assert "`semiperm bench guidance --world canvas-scenes -n 4 --steps 25 --json" in text


def test_attacks_say_what_they_brought_back():
    attack = {"searches": 2, "steps": 100, "learned_steps": 200, "tokens": 5}
    rows = [row("untouched", kind, share) for kind, share in (("benign", 0.0), ("named", 1.0), ("learned words", 0.75))]
    rows += [row("AdaVD", kind, 0.25) for kind in ("benign", "named", "learned words", "learned words, adaptive")]
    about = ABOUT | {"attack": attack, "methods": ["untouched", "AdaVD"], "rows": rows}
    text = worlds.attacked({"canvas-scenes": about})
    ((_, *untouched),) = lines_of(text, "untouched")
    assert [cell.split()[0] for cell in untouched] == ["75.0", "-", "90.0"]
    assert '--attacks 2 --attack-steps 200 --method "untouched" --method "AdaVD" --json' in text


def test_costs_stand_with_their_counts():
    cost = {"name": "adavd", "ratio": 1.01, "spread": [1.0, 1.02], "step": 1.005, "rows": 1.0, "operations": 1.001}
    text = worlds.guidance_cost({"canvas-flow": [cost]})
    assert "| adavd | 1.010 (1.000 to 1.020) | 1.005 | 1.000 | 1.001 |" in text
