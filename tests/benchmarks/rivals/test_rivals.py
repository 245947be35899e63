"""What every rival keeps: it changes the concept's picture, leaves no bit behind, and says what it cannot do."""

import re
from pathlib import Path

import pytest
import torch
from semiperm.benchmarks.erasure.methods import Told
from semiperm.benchmarks.rivals import RIVALS, table
from semiperm.methods.errors import SemipermError
from tiny_models import build, call

ROOT = Path(__file__).resolve().parents[3]
TOLD = {"robot": ("robot", "android"), "cat": ("cat",)}
OTHERS = ("dog", "house", "car", "river")
QUICK = {
    "spm": {"steps": 2},
    "esd_x": {"steps": 2},
    "esd_u": {"steps": 2},
    "hirm": {"steps": 2},
    "few_shot": {"pictures": 1, "passes": 1, "steps": 2},
    "advunlearn": {"steps": 2, "attack": 1},
    "casteer": {"pairs": 4, "steps": 3},
    "gloce": {"pictures": 2, "steps": 5},
    "neurons": {"seeds": 2, "usual": 6},
    "safree": {"alpha": 0.0},  # of a random text encoder no word stands out
}
STEPS = {"safree": 20}  # it acts in the first tenth of the schedule at least
PROMPT = "a painting of a robot in the garden"


def told():
    return Told(TOLD, OTHERS)


def bits(pipe):
    return {
        f"{name}.{key}": value.clone()
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


def hooks_of(pipe):
    return {
        (name, path): (type(module), len(module._forward_hooks), module.__dict__.get("_semiperm_calls"))
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        for path, module in part.named_modules()
    }


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_acts_and_leaves_nothing(name):
    pipe, known, steps = build("sd15"), told(), STEPS.get(name, 2)
    bare, before, placed = call(pipe, PROMPT, steps=steps), bits(pipe), hooks_of(pipe)
    flags = {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    with RIVALS[name](pipe, known, **QUICK.get(name, {})) as extra:
        first = call(pipe, PROMPT, steps=steps, **extra)
    assert not torch.equal(first, bare) and torch.isfinite(first).all()
    after = bits(pipe)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert hooks_of(pipe) == placed and {key: p.requires_grad for key, p in pipe.unet.named_parameters()} == flags
    assert all(p.grad is None for part in (pipe.unet, pipe.text_encoder) for p in part.parameters())
    assert torch.equal(call(pipe, PROMPT, steps=steps), bare)
    with RIVALS[name](pipe, known, **QUICK.get(name, {})) as extra:  # what was fitted is kept
        assert torch.equal(call(pipe, PROMPT, steps=steps, **extra), first)
    with pytest.raises(ZeroDivisionError), RIVALS[name](pipe, known, **QUICK.get(name, {})):
        1 / 0  # noqa: B018
    assert torch.equal(call(pipe, PROMPT, steps=steps), bare)


@pytest.mark.parametrize("name", [name for name, row in RIVALS.items() if name != "negative_prompt"])
def test_told_of_nothing(name):
    with pytest.raises(SemipermError, match="concept"), RIVALS[name](build("sd15"), Told({})):
        pass


@pytest.mark.parametrize("name", RIVALS)
def test_where_a_rival_is_not_made_for_a_model_it_says_so(name):
    pipe = build("sd3")
    bare = call(pipe, PROMPT)
    if RIVALS[name].models == "UNet":
        with pytest.raises(SemipermError, match="UNet"), RIVALS[name](pipe, told(), **QUICK.get(name, {})):
            pass
    else:
        with RIVALS[name](pipe, told(), **QUICK.get(name, {})) as extra:
            assert not torch.equal(call(pipe, PROMPT, **extra), bare)
    assert torch.equal(call(pipe, PROMPT), bare)


@pytest.mark.parametrize("name", ["neurons", "casteer", "speed", "uce", "dp"])
def test_two_text_encoders_are_one_text(name):
    pipe = build("sdxl")
    bare = call(pipe, PROMPT)
    with RIVALS[name](pipe, told(), **QUICK.get(name, {})):
        assert not torch.equal(call(pipe, PROMPT), bare)
    assert torch.equal(call(pipe, PROMPT), bare)


def test_every_file_is_a_rival_and_says_its_source():
    folder = ROOT / "benchmarks" / "rivals"
    helpers = {"__init__", "shared", "guided", "training"}
    assert {row.file for row in RIVALS.values()} == {path.stem for path in folder.glob("*.py")} - helpers
    for row in RIVALS.values():
        text = " ".join((folder / f"{row.file}.py").read_text(encoding="utf-8").split())
        assert "Source: " in text and ("We differ" in text or row.file == "negative_prompt")
        numbers = re.findall(r"\d{4}\.\d{5}", row.source)
        assert all(number in text for number in numbers), row.name


def test_the_page_has_the_registry():
    assert table() in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), table()
