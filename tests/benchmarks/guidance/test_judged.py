"""Safe guidance judged on embedded worlds: what is asked, what methods are told, and the rows; no picture is drawn."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from semiperm.benchmarks.guidance import judged, methods, worlds
from semiperm.canvas.editions import WORLDS, world_of
from semiperm.canvas.world import Shown, Sight
from semiperm.methods.errors import SemipermError


class Painter:
    """A pipeline whose picture is its prompt; `gone` hazards are not drawn."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.calls, self.gone = [], ()

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompts, generator, **call):
        self.calls.append((tuple(prompts), [float(torch.rand(1, generator=g)) for g in generator], call))
        gone = tuple(call.get("negative_prompt", [""])[0].split(", "))
        return SimpleNamespace(images=[(prompt, (*self.gone, *gone)) for prompt in prompts])


@pytest.fixture
def painter(monkeypatch):
    """`run` with pictures that show all that was asked for, less what the method takes away."""
    pipe, told = Painter(), []

    def judges_of(self):
        truth = {one.prompt: one.shown for one in worlds.asked_of(self, 2, 0)}

        def see(images):
            shown = []
            for prompt, gone in images:
                asked = truth[prompt]
                kept = tuple(h for h in asked.hazards if h not in gone and self.mention(h) not in gone)
                shown.append(Shown(asked.objects, asked.style, asked.background, hazards=kept))
            return Sight(shown, torch.zeros(len(shown), 2))

        return {"first": see, "second": lambda images: Sight([Shown()] * len(images), torch.zeros(1, 2))}

    @contextlib.contextmanager
    def safe(pipe, config):
        told.append([category.phrases for category in config.chosen])
        pipe.gone = tuple(category.name for category in config.chosen)
        yield
        pipe.gone = ()

    monkeypatch.setattr(judged, "load_pipeline", lambda name: pipe)
    monkeypatch.setattr(methods, "apply_safe_guidance", safe)
    for cls in {type(world) for world in WORLDS.values()}:
        monkeypatch.setattr(cls, "judges", judges_of)
        monkeypatch.setattr(cls, "files", lambda self: [])
    pipe.told = told
    return pipe


def row_of(found, method, kind, category="", scope="all", judge="first"):
    keys = ("method", "kind", "category", "categories", "judge")
    (row,) = [r for r in found["rows"] if tuple(r[k] for k in keys) == (method, kind, category, scope, judge)]
    return row


@pytest.mark.parametrize("name", ["canvas", "canvas-flow"])
def test_prompts_ask_by_words_that_no_method_is_told(name):
    world = world_of(name)
    asked, categories = worlds.asked_of(world, 4, 0), worlds.categories_of(world)
    assert asked == worlds.asked_of(world, 4, 0) != worlds.asked_of(world, 4, 1)
    told = {category.name: category.phrases for category in categories}
    assert list(told) == list(world.names("hazard"))
    for hazard, phrases in told.items():
        assert all(world.phrases(hazard)[0] in phrase for phrase in phrases)
        assert not any(kept in phrase for kept in world.reserved(hazard) for phrase in phrases)
    for one in asked:
        text = one.prompt.lower()
        assert one.shown.hazards == ((one.hazard,) if one.hazard else ()) and bool(one.hazard) != (one.kind == "benign")
        if one.kind == "named":
            assert world.phrases(one.hazard)[0] in text
        if one.kind == "other words":
            assert any(p in text for p in world.reserved(one.hazard)) and world.phrases(one.hazard)[0] not in text
        if one.kind == "implied":
            assert all(word in text for word in world.implied[one.hazard])
    assert ("implied" in {one.kind for one in asked}) == bool(world.implied)
    assert len(asked) == 4 * (3 * len(world.names("hazard")) + len(world.implied))


def test_all_at_once_and_one_at_a_time(painter, tmp_path):
    chosen, file = ("untouched", "negative prompt", "SLD strong"), tmp_path / "runs.jsonl"
    done = []
    found = judged.run("canvas-flow", 2, chosen, file, lambda: done.append(1), steps=3)
    assert len(done) == judged.batches("canvas-flow", 2, chosen) and json.loads(json.dumps(found)) == found
    assert found["num_inference_steps"] == 3 and all(call["num_inference_steps"] == 3 for *_, call in painter.calls)
    assert row_of(found, "untouched", "named")["hazard"][0] == row_of(found, "untouched", "implied")["hazard"][0] == 1
    assert not [row for row in found["rows"] if row["method"] == "untouched" and row["categories"] == "one"]
    assert row_of(found, "SLD strong", "named")["hazard"][0] == 0 and row_of(found, "SLD strong", "named")["n"] == 8
    assert row_of(found, "SLD strong", "other words", "frost", "one")["n"] == 2
    assert row_of(found, "SLD strong", "benign", "", "one")["n"] == row_of(found, "SLD strong", "benign")["n"] == 8
    assert row_of(found, "SLD strong", "benign")["accuracy"][0] == 1
    assert row_of(found, "SLD strong", "benign", judge="second")["accuracy"][0] == 0
    assert [len(categories) for categories in painter.told] == [4, 1, 1, 1, 1]
    negatives = [call["negative_prompt"][0] for *_, call in painter.calls if "negative_prompt" in call]
    assert "fire" in negatives[0] and "claw marks" in negatives[0]  # all at once
    assert sum("fire" in words for words in negatives[-4:]) == 1  # and one at a time
    # one prompt has one noise, whatever is done to it
    noise = {}
    for prompts, values, _ in painter.calls:
        for prompt, value in zip(prompts, values, strict=True):
            assert noise.setdefault(prompt, value) == value
    drawn = len(painter.calls)
    assert judged.run("canvas-flow", 2, chosen, file, steps=3) == found and len(painter.calls) == drawn


def test_a_world_of_one_hazard_has_no_one_at_a_time(painter):
    found = judged.run("canvas", 2, ("untouched", "negative prompt"))
    assert {row["categories"] for row in found["rows"]} == {"all"} and {row["category"] for row in found["rows"]} == {
        ""
    }
    assert {row["kind"] for row in found["rows"]} == {"benign", "named", "other words"}


def test_without_guidance_only_methods_that_need_none():
    kept = judged.methods_of(world_of("canvas-turbo"))
    assert "NAG" in kept and "SAFREE" in kept and "membranes" in kept
    assert not any("SLD" in name or name == "negative prompt" for name in kept)
    assert judged.methods_of(world_of("canvas-flow")) == tuple(judged.METHODS)


def test_an_unknown_world_is_an_error():
    with pytest.raises(SemipermError, match="no embedded world is called 'moon'; choose from canvas, canvas-scenes"):
        judged.run("moon")
