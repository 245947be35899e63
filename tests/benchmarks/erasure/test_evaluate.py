"""UA, IRA, CRA against hand-made judgements, with a pipeline that paints nothing."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from semiperm.benchmarks.erasure import cases as asking
from semiperm.benchmarks.erasure import evaluate as erasure
from semiperm.benchmarks.erasure import scores as scoring
from semiperm.benchmarks.erasure.cases import Case, Roles
from semiperm.benchmarks.store import Store
from semiperm.canvas.editions import world_of
from semiperm.canvas.world import Shown, Sight
from semiperm.methods.errors import MembraneError

WORLD, SCENES = world_of("canvas"), world_of("canvas-flow")


def shown(name, style="", color="", background="", **more):
    colors = (("", color),) if color else ()
    return Shown((name,) if name else (), style, background, colors, **more)


def scores(cases, seen, concepts, world=WORLD):
    roles = asking.roles(world, cases, concepts)
    return scoring.scores(world, cases, roles, dict(enumerate(seen)), concepts)


def test_wilson_interval():
    low, high = scoring.wilson(0.9, 100)  # R: prop.test(90, 100, correct=FALSE)
    assert (low, high) == (pytest.approx(0.82563, abs=1e-5), pytest.approx(0.94477, abs=1e-5))
    assert scoring.wilson(1.0, 50)[1] == pytest.approx(1.0) and scoring.wilson(0.0, 50)[0] == 0.0


CASES = [
    Case("a", 0, shown("robot", "flat")),
    Case("b", 1, shown("robot", "sketch")),
    Case("c", 2, shown("star", "flat")),
    Case("d", 3, shown("star", "sketch")),
    Case("e", 4, shown("ghost", "")),
]
SEEN = [
    shown("", "flat"),
    shown("robot", "sketch"),
    shown("star", "neon"),
    shown("moon", "sketch"),
    shown("ghost", "neon"),
]


def test_scores_of_an_object():
    got = scores(CASES, SEEN, ["robot"])
    assert got["ua"].value == 1 / 2
    assert got["ira"].value == 2 / 3  # star, star, ghost
    assert got["cra"].value == 1 / 2  # the ghost's style is not judged
    assert got["cra"].n == 2


def test_scores_of_a_style_and_of_a_synonym():
    got = scores(CASES, SEEN, ["pencil drawn"])
    assert got["ua"].value == 0.0
    assert got["ira"].value == 1 / 2  # flat, neon for flat; the ghost's style is not judged
    assert got["cra"].value == 2 / 3  # robot gone, star, ghost


def test_scores_of_two_concepts_leave_both_out_of_the_others():
    got = scores(CASES, SEEN, ["robot", "ghost"])
    assert got["ua"].n == 3 and got["ua"].hits == 1
    assert got["ira"].n == 4 and got["ira"].value == 1 / 2 and got["ira"].distinct == 4


@pytest.mark.parametrize("concept", ["elephant", "red", "moon", "hazard mark"])
def test_concepts_that_cannot_be_scored(concept):
    with pytest.raises(MembraneError, match=concept.split()[0]):
        scores(CASES, SEEN, [concept])


def test_nothing_judged_is_no_figure():
    got = scores(CASES[:1], SEEN[:1], ["robot"])
    assert got["ira"].interval() == [None, None, None]


def test_built_in_cases_cover_every_pair():
    from semiperm.canvas import captions

    cases = asking.built_in_cases(WORLD, 2)
    hazards = [case for case in cases if case.kind == "hazard"]
    assert len(hazards) == 24 and all("hazard" in case.shown for case in hazards) and cases[-24:] == hazards
    assert len({case.seed for case in cases}) == len(cases)
    assert cases == asking.built_in_cases(WORLD, 2)
    cases = cases[:-24]
    pairs = {(case.shown.objects[0], case.shown.style) for case in cases}
    assert len(pairs) == len(captions.OBJECTS) * len(captions.STYLES) and len(cases) == 2 * len(pairs)
    for case in cases:
        assert any(phrase in case.prompt for phrase in captions.phrases(case.shown.objects[0])), case
        assert any(phrase in case.prompt for phrase in captions.phrases(case.shown.style)), case
    by_name = sum(case.shown.objects[0] in case.prompt for case in cases)
    assert len(cases) / 5 < by_name < len(cases) / 2  # the others by synonym


def write(tmp_path, text):
    path = tmp_path / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_read_cases(tmp_path):
    path = write(tmp_path, '\ufeffseed,prompt,object,style,note\n7,"a robot, neon",android,neon,x\n8,fog,,\n')
    assert asking.read_cases(path, WORLD) == [Case("a robot, neon", 7, shown("robot", "neon")), Case("fog", 8)]
    path = write(tmp_path, "prompt,seed,object,style,hazard\na danger,7,,,warning sign\n")
    assert asking.read_cases(path, WORLD) == [Case("a danger", 7, Shown(hazards=("hazard",)), "hazard")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,seed,object\na,1,robot\n", "no column style"),
        ("prompt,seed,object,style\n,1,robot,flat\n", "line 2: the prompt is empty"),
        ("prompt,seed,object,style\na,-1,robot,flat\n", "'-1'"),
        ("prompt,seed,object,style\na,1,elephant,flat\n", "elephant"),
        ("prompt,seed,object,style\na,1,flat,flat\n", "of the domain style"),
        ("prompt,seed,object,style\n", "no prompts"),
        ("", "no column"),
    ],
)
def test_read_cases_says_what_is_wrong(tmp_path, text, words):
    with pytest.raises(MembraneError, match=words):
        asking.read_cases(write(tmp_path, text), WORLD)


def picture(text, erased):
    """A grey picture that carries its prompt, and what was erased; the left half is changed by the erasing."""
    image = Image.new("RGB", (128, 128), (100, 100, 100))
    image.paste((100 + 10 * len(erased),) * 3, (0, 0, 64, 128))
    image.info |= {"text": text, "erased": erased}
    return image


class Painter:
    """A pipeline whose picture is its prompt; concepts in `erased` become nothing."""

    def __init__(self):
        self.calls, self.erased = [], ()

    def __call__(self, prompt, generator, **call):
        noise = [float(torch.rand(1, generator=g)) for g in generator]
        self.calls.append((tuple(prompt), noise, call))
        return SimpleNamespace(images=[picture(text, self.erased) for text in prompt])


def judge(images):
    """Reads the truth off the prompt, except for what was erased."""
    return judge_of(CASES)(images)


def judge_of(cases):
    truth = {case.prompt: case.shown for case in cases}

    def see(images):
        seen = []
        for image in images:
            asked = truth[image.info["text"]]
            kept = {d: tuple(n for n in asked.names(d) if n not in image.info["erased"]) for d in ("object", "hazard")}
            places = tuple((name, 32.0 + 64 * i, 64.0) for i, name in enumerate(kept["object"]))
            seen.append(replace(asked, objects=kept["object"], hazards=kept["hazard"], places=places))
        return Sight(seen, torch.zeros(len(images), 4))

    return see


JUDGES = {"first": judge}


@contextmanager
def perfect(pipe, told):
    pipe.erased = tuple(told.words)
    yield {"negative_prompt": "x"}
    pipe.erased = ()


def test_observe_gives_each_case_its_own_noise():
    pipe = Painter()
    ticks = []
    seen = erasure.observe(pipe, JUDGES, CASES, batch=2, advance=ticks.append, negative_prompt="bad")
    assert [look.seen["first"].objects for look in seen] == [case.shown.objects for case in CASES]
    assert ticks == [2, 2, 1]
    assert [call["negative_prompt"] for _, _, call in pipe.calls] == [["bad"] * 2, ["bad"] * 2, ["bad"]]
    noise = [n for _, part, _ in pipe.calls for n in part]
    again = Painter()
    erasure.observe(again, JUDGES, CASES, batch=5)
    assert noise == again.calls[0][1] and len(set(noise)) == len(CASES)


def test_evaluate_has_the_promised_shape(tmp_path):
    pipe, ticks = Painter(), []
    sets = [("robot",), ("star",), ("robot", "star")]
    methods = {"perfect": perfect, "nothing": contextmanager(lambda pipe, *_: iter([{}]))}
    result = erasure.evaluate(
        pipe, WORLD, JUDGES, CASES, sets, methods=methods, main="perfect", advance=ticks.append, batch=8
    )
    json.dumps(result)
    assert set(result) == {*scoring.SCORES, "untouched", "n", "method", "rows"}
    assert result["n"] == 5 and result["method"] == "perfect"
    assert result["ua"][0] == result["ira"][0] == result["cra"][0] == 1.0
    assert result["untouched"]["ua"][0] == 0.0 and 0 <= result["ua"][1] < 1.0
    assert sum(ticks) == (1 + 2 * 3) * 5
    assert [(r["method"], r["concept"]) for r in result["rows"][:4]] == [
        ("untouched", "robot"), ("untouched", "star"), ("untouched", "robot+star"), ("perfect", "robot"),
    ]  # fmt: skip
    both = next(r for r in result["rows"] if r["method"] == "perfect" and r["concept"] == "robot+star")
    assert both["ua"][0] == 1.0 and both["ira_drop"] == 0.0
    pooled = next(r for r in result["rows"] if r["method"] == "nothing" and r["concept"] == "objects")
    assert pooled["ua"][0] == 0.0 and pooled["n"] == 4 and "styles" not in {r["concept"] for r in result["rows"]}
    assert {call.get("negative_prompt") is None for _, _, call in pipe.calls} == {True, False}


def test_objects_and_styles_are_never_pooled():
    sets = [("robot",), ("star",), ("flat",), ("sketch",), ("robot", "flat")]
    result = erasure.evaluate(Painter(), WORLD, JUDGES, CASES, sets, methods={"perfect": perfect}, main="perfect")
    assert set(result) == {"n", "method", "rows"}  # no figure over both
    pooled = {
        r["concept"]: r for r in result["rows"] if r["method"] == "perfect" and r["concept"] in ("objects", "styles")
    }
    assert pooled["objects"]["ua"][0] == 1.0 and pooled["styles"]["ua"][0] == 0.0  # this one paints no style away
    assert pooled["styles"]["concepts"] == ["flat", "sketch"]
    assert pooled["objects"]["n"] == 4 and pooled["styles"]["n"] == 4
    singles = [r for r in result["rows"] if r["method"] == "perfect" and r["concept"] in ("flat", "sketch")]
    assert sum(r["ua"][0] * r["n"] for r in singles) / 4 == pooled["styles"]["ua"][0]
    one = erasure.evaluate(
        Painter(), WORLD, JUDGES, CASES, [("robot", "flat")], methods={"perfect": perfect}, main="perfect"
    )
    assert one["ua"] == one["rows"][-1]["ua"] and [r["concept"] for r in one["rows"]] == ["robot+flat"] * 2


def test_each_takes_as_many_that_ask_as_others():
    pick = asking.roles(WORLD, CASES, ["robot"], 1)
    assert [CASES[i].shown.objects for i in pick.asks] == [("robot",)] and len(pick.others) == 1
    assert asking.roles(WORLD, CASES, ["robot"]) == asking.roles(WORLD, CASES, ["robot"], 9) == Roles((0, 1), (2, 3, 4))
    pipe = Painter()
    erasure.evaluate(pipe, WORLD, JUDGES, CASES, [("robot",)], methods={"perfect": perfect}, each=1)
    assert [len(prompts) for prompts, *_ in pipe.calls] == [2, 2]


def test_methods_know_the_names_alone_where_words_are_withheld():
    told = []

    @contextmanager
    def spy(pipe, given):
        told.append(given.words)
        yield {}

    for words in WORLD.askings:
        erasure.evaluate(Painter(), WORLD, JUDGES, CASES, [("robot", "star")], methods={"spy": spy}, words=words)
    assert told[0]["robot"] == ("robot", "android", "mechanical man") and told[1] == {
        "robot": ("robot",),
        "star": ("star",),
    }
    from semiperm.canvas import captions

    for case in asking.built_in_cases(WORLD, 1, words="withheld"):
        ((name,), style) = case.shown.objects, case.shown.style
        assert name not in case.prompt.split() and style not in case.prompt.split(), case
        assert any(phrase in case.prompt for phrase in captions.phrases(name)[1:]), case


def test_comparisons_with_the_untouched_pictures():
    before = [shown("robot", "flat", "red", "sky"), shown("robot", "sketch", "red", "fog"), *SEEN[2:]]
    after = [
        shown("nothing", "flat", "red", "sky"),
        shown("robot", "sketch", "blue", "fog"),
        shown("moon", "neon"),
        *SEEN[3:],
    ]
    roles, (before, after) = asking.roles(WORLD, CASES, ["robot"]), (dict(enumerate(seen)) for seen in (before, after))
    against = {0: shown("robot", "flat"), 1: shown("star", "sketch")}
    found = scoring.comparisons(CASES, roles, after, before, against, ["robot"])
    assert (found["kept"].hits, found["kept"].n) == (2, 3)  # the star became a moon
    assert (found["attributes"].hits, found["attributes"].n) == (6, 7)  # two say a colour, one of them another
    assert (found["negative"].hits, found["negative"].n) == (1, 2)


def test_the_negative_prompt_names_what_was_erased():
    pipe, methods = Painter(), {"nothing": contextmanager(lambda pipe, *_: iter([{}]))}
    erasure.evaluate(pipe, WORLD, JUDGES, CASES, [("robot",)], methods=methods, negative=True, words="withheld")
    asked = [(prompts, call["negative_prompt"]) for prompts, _, call in pipe.calls if "negative_prompt" in call]
    assert asked == [(("a", "b"), ["robot", "robot"])] * 2


def test_evaluate_refuses_before_it_paints():
    pipe = Painter()
    with pytest.raises(MembraneError, match="moon"):
        erasure.evaluate(pipe, WORLD, JUDGES, CASES, [("robot",), ("moon",)], methods={"perfect": perfect})
    assert not pipe.calls


def test_finished_runs_are_not_made_again(tmp_path):
    file = tmp_path / "sub" / "runs.jsonl"
    first, second, third = Painter(), Painter(), Painter()

    def run(pipe, settings):
        return erasure.evaluate(
            pipe,
            WORLD,
            JUDGES,
            CASES,
            [("robot",)],
            methods={"perfect": perfect},
            finished=Store(file, "evaluate", settings),
        )

    expected = run(first, {"steps": 1})
    assert run(second, {"steps": 1}) == expected and not second.calls
    assert run(third, {"steps": 2}) == expected and len(third.calls) == len(first.calls)


# ---- scenes, look-alikes, hazards: what the first edition's pictures cannot show -------------------------------------

MORE = [
    Case("f", 5, shown("robot", "flat")),
    Case("g", 6, shown("quibble", "flat")),
    Case("h", 7, shown("nibble", "neon")),
    Case("i", 8, Shown(("quibble", "star"), "neon"), "two"),
    Case("j", 9, Shown(("star", "robot"), "flat"), "two"),
    Case("k", 10, Shown(("star",), "flat", hazards=("claws",)), "hazard"),
    Case("l", 11, Shown(("star",), "flat", hazards=("claws",)), "implied"),
    Case("m", 12, Shown(("ring",), "flat", hazards=("frost",)), "hazard"),
]


def test_each_prompt_has_its_part():
    assert asking.roles(SCENES, MORE, ["quibble"]) == Roles((1,), (0, 2), (3,), (2,))
    assert asking.roles(SCENES, MORE, ["quibble", "nibble"]) == Roles((1, 2), (0,), (3,))
    assert asking.roles(SCENES, MORE, ["claws"]) == Roles((5,), (0, 1, 2, 7), (), (), (6,))
    assert asking.roles(SCENES, MORE, ["flat"]) == Roles((0, 1), (2,))


def test_twins_scenes_and_implied_hazards_are_scored():
    seen = [case.shown for case in MORE]
    seen[2], seen[3] = Shown(("quibble",), "neon"), Shown(("quibble",), "neon")
    got = scores(MORE, seen, ["quibble"], SCENES)
    assert (got["twin"].value, got["scene"].value, got["other"].value) == (0.0, 0.0, 0.0)
    got = scores(MORE, [Shown(("star",), "flat")] * len(MORE), ["claws"], SCENES)
    assert got["ua"].value == got["implied"].value == 1.0
    assert (got["ira"].value, got["ira"].n) == (0.0, 1)  # the frost is gone, too
    assert (got["cra"].hits, got["cra"].n) == (3, 8) and got["twin"].n == got["scene"].n == 0


def test_pixels_outside_the_box_are_compared():
    roles, before = Roles((), (), (0,)), {0: Shown(("star",), places=(("star", 100.0, 64.0),))}
    case, dark, light = Case("a", 0, Shown(("star", "ring")), "two"), bytes(768), bytes([8] * 768)
    assert scoring.outside([case], roles, before, {0: light}, {0: dark}, ["star"]) == [8.0]
    inside = bytearray(dark)
    inside[3 * (16 * 8 + 12)] = 255  # the cell in the middle of the star
    assert scoring.outside([case], roles, before, {0: bytes(inside)}, {0: dark}, ["star"]) == [0.0]
    assert scoring.outside([case], roles, before, {0: light}, {0: dark}, ["ring"]) == []  # it was not seen


def test_two_judges_see_the_same_pictures(tmp_path):
    pipe, blind = Painter(), lambda images: Sight([Shown()] * len(images), torch.zeros(len(images), 4))
    judges, store = {"first": judge_of(MORE), "second": blind}, tmp_path / "runs.jsonl"

    def run():
        finished, sets = Store(store, "evaluate"), [("quibble",), ("robot",), ("star",), ("claws",)]
        methods = {"perfect": perfect}
        return erasure.evaluate(pipe, SCENES, judges, MORE, sets, methods=methods, words="reserved", finished=finished)

    result = run()
    assert all(row["world"] == "canvas-flow" and row["words"] == "reserved" for row in result["rows"])
    found = {(row["method"], row["concept"], row["judge"]): row for row in result["rows"]}
    assert {concept for _, concept, _ in found} == {"quibble", "robot", "star", "claws", "characters"}
    own, other = found["perfect", "quibble", "first"], found["perfect", "quibble", "second"]
    assert own["ua"][0] == own["scene"][0] == own["other"][0] == own["twin"][0] == 1.0 and other["other"][0] == 0.0
    assert found["untouched", "quibble", "first"]["scene"][0] == found["untouched", "quibble", "first"]["outside"] == 0
    # the left half changed, where the quibble is and the star of the other scene is not
    assert 0 < own["outside"] < found["perfect", "robot", "first"]["outside"] and other["outside"] is None
    assert found["perfect", "characters", "first"]["concepts"] == ["quibble", "robot"]
    drawn = len(pipe.calls)
    assert run() == result and len(pipe.calls) == drawn and json.loads(json.dumps(result)) == result


def test_the_second_editions_prompts_cover_what_is_judged():
    for words, asked in SCENES.askings.items():
        cases = asking.built_in_cases(SCENES, 1, words=words)
        assert len({case.seed for case in cases}) == len(cases)
        kinds = {kind: [case for case in cases if case.kind == kind] for kind in ("one", "two", "hazard", "implied")}
        assert len(kinds["one"]) == 16 * 8 and len(kinds["hazard"]) == 4 * 12 and len(kinds["implied"]) == 2 * 12
        assert all(len(case.shown.objects) == 2 for case in kinds["two"]) and len(kinds["two"]) == 16 * 6
        assert asking.check_asked(SCENES, cases, [name for names in SCENES.suite for name in names])
        for case in kinds["one"] + kinds["hazard"]:
            own = [*case.shown.objects, *case.shown.hazards]
            said, kept = SCENES.phrases, SCENES.reserved
            for name in own:
                wanted = kept(name) if asked.wording == "reserved" else said(name)
                assert any(phrase in case.prompt.lower() for phrase in wanted), case
