"""The arena's loop, its rows and tables, on a pipeline that paints nothing and judges that know what was asked."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from semiperm.benchmarks.arena import cells, run, scoring, surfaces
from semiperm.benchmarks.arena.asking import questions
from semiperm.benchmarks.arena.measure import plan
from semiperm.benchmarks.arena.orderings import ORDERINGS, agreement, eraser_of
from semiperm.benchmarks.arena.plot import arena_plot
from semiperm.benchmarks.arena.settings import FULL, QUICK, Settings, chosen, many
from semiperm.benchmarks.page.arena import tables
from semiperm.benchmarks.store import Store
from semiperm.canvas.editions import world_of
from semiperm.canvas.world import Shown, Sight
from semiperm.methods.errors import ModelError, SemipermError

WORLD, SCENES = world_of("canvas"), world_of("canvas-flow")
TINY = Settings(asks=4, others=6, part=4, attacked=2, rounds=2, steps=2)


# ---- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["robot", "quibble", "neon", "claws", "unit"])
def test_each_part_asks_what_it_says(name):
    asked = questions(SCENES, [name], TINY)
    assert asked == questions(SCENES, [name], TINY) and len({case.seed for case in asked.cases}) == len(asked.cases)
    for part, words in (("public", SCENES.phrases(name)), ("reserved", SCENES.reserved(name))):
        for case in asked.of(part):
            assert name in case.shown and any(word in case.prompt.lower() for word in words), case
    others = [case for part in ("others", "twins", "relations", "counts") for case in asked.of(part)]
    assert others and not any(name in case.shown for case in others)
    assert all(case.shown.relations and len(case.shown.objects) == 2 for case in asked.of("relations"))
    assert {count for case in asked.of("counts") for _, count in case.shown.counts} == {2, 3}
    domain = SCENES.resolve(name)[1]
    assert all(name in case.shown and len(case.shown.objects) == 2 for case in asked.of("scenes"))
    assert bool(asked.of("scenes")) == (domain == "object")
    assert [case.shown.objects for case in asked.of("twins")] == ([("nibble",)] * 4 if name == "quibble" else [])
    assert bool(asked.of("implied")) == (name == "claws")
    assert any(case.shown.hazards for case in asked.of("others")) == (domain == "hazard")
    assert any(case.shown.memorised for case in asked.of("others")) == (domain == "memorised")


def test_a_short_run_asks_what_a_long_one_asks_first():
    short, long = questions(SCENES, ["star"], TINY), questions(SCENES, ["star"], FULL)
    for part, places in short.parts.items():
        assert short.of(part) == long.of(part)[: len(places)]


def test_a_world_of_one_object_has_no_scenes():
    asked = questions(WORLD, ["lighthouse"], TINY)
    assert {part for part, places in asked.parts.items() if places} == {"public", "others"}
    missing = {entry["part"]: entry["why"] for entry in scoring.missing_of(WORLD, [asked])}
    assert set(missing) == {"reserved", "twins", "scenes", "implied", "relations", "counts"}


def test_many_at_once_leave_something_to_ask_for():
    assert many(WORLD, 30) == () and len(many(WORLD, 10)) == 10
    assert many(SCENES, 10)[:3] == many(SCENES, 3) and len(set(many(SCENES, 30))) == 30
    kinds = {SCENES.resolve(name)[1] for name in many(SCENES, 10)}
    assert kinds == {"object", "style", "hazard", "memorised"}
    asked = questions(SCENES, many(SCENES, 30), TINY)
    assert all(name in [n for case in asked.of("public") for n in many(SCENES, 30) if n in case.shown]
               for name in many(SCENES, 30))  # fmt: skip
    assert not any(name in case.shown for case in asked.of("others") for name in many(SCENES, 30))
    assert chosen(WORLD, quick=True) == [("robot",), ("striped",), ("lighthouse",)]
    assert len(chosen(SCENES, quick=False)) == 15 + 5


def test_quick_is_small_enough():
    """Seconds by the time of a picture of 25 steps, .6 on two quiet cores; a search's step is as dear as three."""
    per_step, kinds = 0.6 / 25, len(QUICK.searches)
    drawn = 2 * QUICK.asks + QUICK.others + 5 * QUICK.part + 6 * QUICK.attacked
    pictures = drawn * QUICK.steps * per_step
    searched = (QUICK.search_steps * 2 * kinds + QUICK.embedding_steps * 4) * per_step / 2 * 3
    timed = (3 * QUICK.rounds + 2) * 4 * 4 * per_step
    assert pictures + searched + timed < 25 and QUICK.minutes < 30
    entry = plan(WORLD, quick=True)
    assert {"closed_form/auto", "membranes/image", "dp", "hirm"} < set(entry.methods) and len(entry.sets) == 4
    said = {one["concept"]: one["why"] for one in entry.missing}
    assert "minutes" in said["spm"] and not set(said) & set(entry.methods)
    assert set(said) | set(entry.methods) == set(plan(WORLD).methods)
    assert "spm" in plan(WORLD, quick=True, methods=["spm"]).methods


# ---- a stub world ----------------------------------------------------------------------------------------------------


class Painter:
    """A pipeline whose picture carries its prompt; concepts in `erased` become nothing."""

    def __init__(self):
        self.erased, self.calls, self.device = (), 0, torch.device("cpu")

    def __call__(self, prompt, generator=None, callback_on_step_end=None, num_inference_steps=1, **call):
        self.calls += 1
        if callback_on_step_end is not None:
            for step in range(num_inference_steps):
                callback_on_step_end(self, step, 0, {})
        images = []
        for text in prompt:
            image = Image.new("RGB", (128, 128), (100, 100, 100))
            image.paste((100 + 10 * len(self.erased),) * 3, (0, 0, 8, 128))  # far from everything
            image.info |= {"text": text, "erased": self.erased}
            images.append(image)
        return SimpleNamespace(images=images)


def judge_of(asked):
    truth = {case.prompt: case.shown for case in asked.cases}

    def see(images):
        seen = []
        for image in images:
            shown, erased = truth[image.info["text"]], image.info["erased"]
            objects = tuple(name for name in shown.objects if name not in erased)
            places = tuple((name, 40.0 + 50 * i, 64.0) for i, name in enumerate(objects))
            style = "" if shown.style in erased else shown.style
            seen.append(replace(shown, objects=objects, places=places, style=style))
        return Sight(seen, torch.zeros(len(images), 4))

    return see


def painted(attacker, pipe, extra):
    """A surface that asks by name."""
    return pipe([attacker.asked], **extra).images * 2


def refused(attacker, pipe, extra):
    raise ModelError("no such attack on a painter")


@contextmanager
def perfect(pipe, told):
    pipe.erased = tuple(told.words)
    yield {}
    pipe.erased = ()


@contextmanager
def not_made_for_it(pipe, told):
    raise ModelError("Painter is no UNet2DConditionModel")
    yield {}


@contextmanager
def clumsy(pipe, told):
    pipe.encode_prompt = lambda: None  # left behind
    yield {}


METHODS = {"perfect": perfect, "not made for it": not_made_for_it, "clumsy": clumsy}


@pytest.fixture
def field(monkeypatch):
    """Makes an arena of painters, of what was erased in `names`."""
    monkeypatch.setitem(surfaces.SURFACES, "hard prompts", painted)
    for name in list(surfaces.SURFACES)[1:]:
        monkeypatch.setitem(surfaces.SURFACES, name, refused)

    def make(names=("robot",), methods=METHODS, store=None, world=SCENES, settings=TINY, **more):
        asked = questions(world, names, settings)
        blind = lambda images: Sight([Shown()] * len(images), torch.zeros(len(images), 1))  # noqa: E731
        judges, pipes = {"first": judge_of(asked), "second": blind}, []

        def load():
            pipes.append(Painter())
            return pipes[-1]

        call = {"num_inference_steps": 2, "guidance_scale": 4.0}
        arena = run.Arena(world, load, judges, methods, settings, store or Store(None, "arena"), call=call, **more)
        arena.pipes = pipes
        arena._attacker = lambda asked: SimpleNamespace(asked=asked.of("public")[0].prompt)
        return arena

    return make


def rows_of(arena, names=("robot",)):
    found = list(arena.run([names]))
    return {
        (row["judge"], row["method"], row["concept"]): row
        for row in scoring.rows_of(arena.world, list(arena.judges), found)
    }


def test_every_method_has_a_row_that_says_what_it_did_or_why_not(field):
    arena, ticks = field(), []
    arena.on_cell(lambda: ticks.append(1))
    rows = rows_of(arena)
    assert len(ticks) == arena.total([("robot",)])
    assert {key[1] for key in rows} == {"untouched", *METHODS} and {key[2] for key in rows} == {"robot", "characters"}
    json.dumps(list(rows.values()), allow_nan=False)
    bare, own, failed = (rows["first", name, "robot"] for name in ("untouched", "perfect", "not made for it"))
    assert (
        bare["ua"][0] == bare["reserved"][0] == bare["scene"][0] == 0.0 and bare["surfaces"]["hard prompts"][0] == 1.0
    )
    assert own["ua"][0] == own["reserved"][0] == own["scene"][0] == 1.0 and own["surfaces"]["hard prompts"][0] == 0.0
    for figure in ("ira", "cra", "kept", "other", "relation", "count", "quality"):
        assert own[figure][0] == bare[figure][0] == 1.0 and 0 < own[figure][1] < 1.0, figure
    assert own["ua"][1] == pytest.approx(0.5101, abs=1e-3)  # Wilson's, of 4 of 4
    assert own["robust"][0] == 1.0 and bare["robust"][0] == 0.0
    assert bare["psnr"] is None and own["seconds"] >= 0 and own["step"][0] > 0
    # a tenth of 255 in 8 of 128 columns, where the box leaves them
    assert 20 < own["psnr"][0] < 60 and rows["first", "clumsy", "robot"]["psnr"] == [100.0] * 3
    assert set(failed["why"]) == set(arena.cells_of(questions(SCENES, ["robot"], TINY), "x"))
    assert all("no UNet2DConditionModel" in why for why in failed["why"].values())
    assert failed["ua"] == [None] * 3 and failed["surfaces"]["hard prompts"] == [None] * 3 and failed["seconds"] is None
    assert "no such attack" in own["why"]["inverted latents"] and own["surfaces"]["inverted latents"] == [None] * 3
    assert rows["second", "perfect", "robot"]["ira"][0] == 0.0
    pooled = rows["first", "perfect", "characters"]
    assert pooled["pooled"] and pooled["ua"] == own["ua"] and pooled["concepts"] == ["robot"]


def test_a_spoilt_pipeline_is_thrown_away(field, caplog):
    arena = field(methods={"clumsy": clumsy, "perfect": perfect, "also": perfect})
    rows_of(arena)
    assert len(arena.pipes) == 3 and "clumsy left the pipeline changed" in caplog.text  # bare, clumsy's, the others'


def test_methods_are_told_the_names_alone(field):
    told = []

    @contextmanager
    def spy(pipe, given):
        told.append(given)
        yield {}

    rows_of(field(methods={"spy": spy}))
    assert told[0].words == {"robot": ("robot",)} and "ghost" in told[0].others and "robot" not in told[0].others


def test_a_run_goes_on_where_it_was_stopped(field, tmp_path):
    file = tmp_path / "cells.jsonl"
    expected = rows_of(field())

    class Stopped(Exception):
        pass

    class Power(Store):
        def __init__(self, cells):
            super().__init__(file, "arena")
            self.left = cells

        def put(self, key, value):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            super().put(key, value)

    stopped = field(store=Power(25))
    with pytest.raises(KeyboardInterrupt):
        rows_of(stopped)
    with file.open("a") as torn:
        torn.write('{"settings": "half a li')
    again = field(store=Store(file, "arena"))
    rows = rows_of(again)
    assert again.pipes and again.pipes[0].calls < stopped.pipes[0].calls  # the untouched model's cells were there
    for key, row in rows.items():
        timed = ("seconds", "bytes", "step")
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in expected[key].items() if k not in timed
        }
    third = field(store=Store(file, "arena"))
    assert rows_of(third) == rows and not third.pipes  # nothing to do: no model is loaded


def test_what_breaks_unexpectedly_is_tried_again(field, tmp_path):
    broken = [True]

    @contextmanager
    def flaky(pipe, told):
        if broken[0]:
            raise MemoryError("out of memory")
        yield {}

    def once():
        return rows_of(field(methods={"flaky": flaky}, store=Store(tmp_path / "cells.jsonl", "arena")))

    assert "MemoryError: out of memory" in once()["first", "flaky", "robot"]["why"]["public"]
    broken[0] = False
    assert once()["first", "flaky", "robot"]["ua"][0] == 0.0


def test_time_that_is_over_is_said(field):
    times = iter([0.0] * 6 + [61.0] * 1000)
    arena = field(settings=replace(TINY, minutes=1.0), clock=lambda: next(times))
    rows = rows_of(arena)
    row = rows["first", "perfect", "robot"]
    assert set(row["why"].values()) == {"not begun: the 1 minutes were over"} and row["ua"] == [None] * 3
    assert rows["first", "untouched", "robot"]["ua"][0] == 0.0  # what was made before
    assert not any(pipe.erased for pipe in arena.pipes)


def test_several_concepts_at_once(field):
    names = many(SCENES, 3)
    rows = rows_of(field(names), names)
    assert {key[2] for key in rows} == {"3 at once"}
    row = rows["first", "perfect", "3 at once"]
    assert row["concepts"] == list(names) and row["quality"][0] == 1.0 and row["surfaces"]["redrawn"] == [None] * 3
    assert 0 < row["ua"][0] < 1  # the painter erases no hazard


def test_pixels_outside_the_box():
    black, white = Image.new("RGB", (128, 128)), Image.new("RGB", (128, 128), (10, 10, 10))
    there = Shown(("robot",), places=(("robot", 40.0, 64.0),))
    assert cells._outside(white, black, there, ["robot"]) == 100.0
    patch = black.copy()
    patch.paste((255, 255, 255), (10, 40, 70, 90))
    assert cells._outside(patch, black, there, ["robot"]) == 0.0
    assert cells._outside(patch, black, there, ["star"]) is None


# ---- tables, plot, orderings -----------------------------------------------------------------------------------------


def test_tables_and_plot(field):
    arena = field()
    found = list(arena.run([("robot",)]))
    rows = scoring.rows_of(SCENES, list(arena.judges), found)
    missing = scoring.missing_of(SCENES, [asked for asked, _ in found])
    text = tables({"rows": rows, "missing": missing, "orderings": agreement(rows)}, "canvas-flow")
    assert "| perfect | 100.0 (51.0 to 100.0) |" in text and "**Characters** (robot), %:" in text
    assert "- not made for it: ModelError: Painter is no UNet2DConditionModel (robot)" in text
    assert "- perfect: ModelError: no such attack on a painter (robot: learned embedding, robot: inverted" in text
    assert "- twins: nothing looks alike (robot)" in text and "no eraser was measured here: attack success" in text
    assert "By the second judge" in text
    image = arena_plot(rows)
    assert image.width > 300 and len(image.getcolors(1 << 20)) > 4
    assert arena_plot(rows).tobytes() == image.tobytes()
    assert arena_plot([row | {"quality": [0.2, 0.1, 0.9]} for row in rows]).tobytes() != image.tobytes()


def pooled(method, concept="styles", **figures):
    none = [None] * 3
    row = {"world": "canvas", "judge": "first", "method": method, "concept": concept, "pooled": True}
    return row | {"ua": none, "ira": none, "reserved": none, "surfaces": {"hard prompts": none}} | figures


def test_published_orderings():
    known = {"spm": "SPM", "uce/textbook": "UCE", "dp": "DP", "esd-x": "ESD", "rivals/casteer": "CASteer"}
    assert {name: eraser_of(name) for name in [*known, "closed_form/auto"]} == known | {"closed_form/auto": None}
    success = {"uce": 0.9, "spm": 0.8, "esd": 0.5, "advunlearn": 0.1}
    rows = [pooled(name, surfaces={"hard prompts": [value, 0, 1]}) for name, value in success.items()]
    found = {one["what"]: one for one in agreement(rows)}
    style = found["attack success by words found by gradient, a style (Van Gogh)"]
    assert style["rho"] == 1.0 and "2310.11868" in style["source"] and style["arena"]["UCE"] == 0.9
    assert found["other styles kept"]["rho"] is None and "0 of its erasers" in found["other styles kept"]["why"]
    turned = [pooled(name, surfaces={"hard prompts": [1 - value, 0, 1]}) for name, value in success.items()]
    assert {one["what"]: one for one in agreement(turned)}[style["what"]]["rho"] == -1.0
    # accuracy left of erased objects is what UA lacks: the arena's figure falls
    left = [pooled(name, "objects", ua=[value, 0, 1]) for name, value in (("uce", 0.7), ("esd", 0.8), ("dp", 0.9))]
    assert {one["what"]: one for one in agreement(left)}["accuracy left of erased objects"]["rho"] == 1.0
    same = [pooled(name, ua=[0.5, 0, 1]) for name in ("uce", "esd", "spm")]
    assert "all the same" in {one["what"]: one for one in agreement(same)}["unlearning accuracy of styles"]["why"]
    assert all("arXiv" in one.source for one in ORDERINGS)


def test_plans_refuse_what_they_do_not_know():
    with pytest.raises(SemipermError, match="no method is called 'magic'; choose from membranes/image"):
        plan(WORLD, methods=["magic"])
    with pytest.raises(SemipermError, match="elephant"):
        plan(WORLD, concepts=["elephant"])
    with pytest.raises(SemipermError, match="'red' is a color"):
        plan(WORLD, concepts=["red"])
    entry = plan(WORLD, concepts=["android"], sets=[3, 30])
    assert entry.sets == [("robot",), many(WORLD, 3)] and [one["concept"] for one in entry.missing] == ["30 at once"]
