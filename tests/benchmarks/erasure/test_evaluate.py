"""UA, IRA, CRA against hand-made judgements, with a pipeline that paints nothing."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from semiperm.benchmarks.erasure import evaluate as erasure
from semiperm.benchmarks.erasure.evaluate import Case, Seen
from semiperm.benchmarks.store import Store
from semiperm.methods.errors import MembraneError


def test_wilson_interval():
    low, high = erasure.wilson(0.9, 100)  # R: prop.test(90, 100, correct=FALSE)
    assert (low, high) == (pytest.approx(0.82563, abs=1e-5), pytest.approx(0.94477, abs=1e-5))
    assert erasure.wilson(1.0, 50)[1] == pytest.approx(1.0) and erasure.wilson(0.0, 50)[0] == 0.0


CASES = [
    Case("a", 0, "robot", "flat"),
    Case("b", 1, "robot", "sketch"),
    Case("c", 2, "star", "flat"),
    Case("d", 3, "star", "sketch"),
    Case("e", 4, "ghost", ""),
]
SEEN = [
    Seen("nothing", "flat"),
    Seen("robot", "sketch"),
    Seen("star", "neon"),
    Seen("moon", "sketch"),
    Seen("ghost", "neon"),
]


def test_scores_of_an_object():
    got = erasure.scores(CASES, SEEN, ["robot"])
    assert got["ua"].value == 1 / 2
    assert got["ira"].value == 2 / 3  # star, star, ghost
    assert got["cra"].value == 1 / 2  # the ghost's style is not judged
    assert got["cra"].n == 2


def test_scores_of_a_style_and_of_a_synonym():
    got = erasure.scores(CASES, SEEN, ["pencil drawn"])
    assert got["ua"].value == 0.0
    assert got["ira"].value == 1 / 2  # flat, neon for flat; the ghost's style is not judged
    assert got["cra"].value == 2 / 3  # robot gone, star, ghost


def test_scores_of_two_concepts_leave_both_out_of_the_others():
    got = erasure.scores(CASES, SEEN, ["robot", "ghost"])
    assert got["ua"].n == 3 and got["ua"].hits == 1
    assert got["ira"].n == 4 and got["ira"].value == 1 / 2 and got["ira"].distinct == 4


@pytest.mark.parametrize("concept", ["elephant", "red", "moon"])
def test_concepts_that_cannot_be_scored(concept):
    with pytest.raises(MembraneError, match=concept):
        erasure.scores(CASES, SEEN, [concept])


def test_nothing_judged_is_no_figure():
    got = erasure.scores(CASES[:1], SEEN[:1], ["robot"])
    assert got["ira"].interval() == [None, None, None]


def test_built_in_cases_cover_every_pair():
    from semiperm.canvas import captions

    cases = erasure.built_in_cases(2)
    pairs = {(case.object, case.style) for case in cases}
    assert len(pairs) == len(captions.OBJECTS) * len(captions.STYLES) and len(cases) == 2 * len(pairs)
    assert len({case.seed for case in cases}) == len(cases)
    assert cases == erasure.built_in_cases(2)
    for case in cases:
        assert any(phrase in case.prompt for phrase in captions.phrases(case.object)), case
        assert any(phrase in case.prompt for phrase in captions.phrases(case.style)), case
    by_name = sum(case.object in case.prompt for case in cases)
    assert len(cases) / 5 < by_name < len(cases) / 2  # the others by synonym


def write(tmp_path, text):
    path = tmp_path / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_read_cases(tmp_path):
    path = write(tmp_path, '\ufeffseed,prompt,object,style,note\n7,"a robot, neon",android,neon,x\n8,fog,,\n')
    assert erasure.read_cases(path) == [Case("a robot, neon", 7, "robot", "neon"), Case("fog", 8)]


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
        erasure.read_cases(write(tmp_path, text))


class Painter:
    """A pipeline whose picture is its prompt; concepts in `erased` become nothing."""

    def __init__(self):
        self.calls, self.erased = [], ()

    def __call__(self, prompt, generator, **call):
        noise = [float(torch.rand(1, generator=g)) for g in generator]
        self.calls.append((tuple(prompt), noise, call))
        return SimpleNamespace(images=[(text, self.erased) for text in prompt])


def judge(images):
    """Reads the truth off the prompt, except for what was erased."""
    cases = {case.prompt: case for case in CASES}
    objects = ["nothing" if cases[text].object in erased else cases[text].object for text, erased in images]
    return SimpleNamespace(object=objects, style=[cases[text].style for text, _ in images])


@contextmanager
def perfect(pipe, concepts):
    pipe.erased = tuple(concepts)
    yield {"negative_prompt": "x"}
    pipe.erased = ()


def test_observe_gives_each_case_its_own_noise():
    pipe = Painter()
    ticks = []
    seen = erasure.observe(pipe, judge, CASES, batch=2, advance=ticks.append, negative_prompt="bad")
    assert [s.object for s in seen] == [case.object for case in CASES]
    assert ticks == [2, 2, 1]
    assert [call["negative_prompt"] for _, _, call in pipe.calls] == [["bad"] * 2, ["bad"] * 2, ["bad"]]
    noise = [n for _, part, _ in pipe.calls for n in part]
    again = Painter()
    erasure.observe(again, judge, CASES, batch=5)
    assert noise == again.calls[0][1] and len(set(noise)) == len(CASES)


def test_evaluate_has_the_promised_shape(tmp_path):
    pipe, ticks = Painter(), []
    sets = [("robot",), ("star",), ("robot", "star")]
    methods = {"perfect": perfect, "nothing": contextmanager(lambda pipe, _: iter([{}]))}
    result = erasure.evaluate(pipe, judge, CASES, sets, methods=methods, main="perfect", advance=ticks.append, batch=8)
    json.dumps(result)
    assert set(result) == {*erasure.SCORES, "untouched", "n", "method", "rows"}
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
    result = erasure.evaluate(Painter(), judge, CASES, sets, methods={"perfect": perfect}, main="perfect")
    assert set(result) == {"n", "method", "rows"}  # no figure over both
    pooled = {
        r["concept"]: r for r in result["rows"] if r["method"] == "perfect" and r["concept"] in ("objects", "styles")
    }
    assert pooled["objects"]["ua"][0] == 1.0 and pooled["styles"]["ua"][0] == 0.0  # this one paints no style away
    assert pooled["styles"]["concepts"] == ["flat", "sketch"]
    assert pooled["objects"]["n"] == 4 and pooled["styles"]["n"] == 4
    singles = [r for r in result["rows"] if r["method"] == "perfect" and r["concept"] in ("flat", "sketch")]
    assert sum(r["ua"][0] * r["n"] for r in singles) / 4 == pooled["styles"]["ua"][0]
    one = erasure.evaluate(Painter(), judge, CASES, [("robot", "flat")], methods={"perfect": perfect}, main="perfect")
    assert one["ua"] == one["rows"][-1]["ua"] and [r["concept"] for r in one["rows"]] == ["robot+flat"] * 2


def test_each_takes_as_many_that_ask_as_others():
    pick = erasure.chosen(CASES, ["robot"], 1)
    assert [CASES[i].object == "robot" for i in pick].count(True) == 1 and len(pick) == 2
    assert erasure.chosen(CASES, ["robot"], None) == [0, 1, 2, 3, 4] and erasure.chosen(CASES, ["robot"], 9) == [
        *range(5)
    ]
    pipe = Painter()
    erasure.evaluate(pipe, judge, CASES, [("robot",)], methods={"perfect": perfect}, each=1)
    assert [len(prompts) for prompts, *_ in pipe.calls] == [2, 2]


def test_methods_know_the_names_alone_where_words_are_withheld():
    told = []

    @contextmanager
    def spy(pipe, words):
        told.append(words)
        yield {}

    for words in erasure.WORDS:
        erasure.evaluate(Painter(), judge, CASES, [("robot", "star")], methods={"spy": spy}, words=words)
    assert told[0]["robot"] == ("robot", "android", "mechanical man") and told[1] == {
        "robot": ("robot",),
        "star": ("star",),
    }
    from semiperm.canvas import captions

    for case in erasure.built_in_cases(1, words="withheld"):
        assert case.object not in case.prompt.split() and case.style not in case.prompt.split(), case
        assert any(phrase in case.prompt for phrase in captions.phrases(case.object)[1:]), case


def test_comparisons_with_the_untouched_pictures():
    before = [Seen("robot", "flat", "red", "sky"), Seen("robot", "sketch", "red", "fog"), *SEEN[2:]]
    after = [
        Seen("nothing", "flat", "red", "sky"),
        Seen("robot", "sketch", "blue", "fog"),
        Seen("moon", "neon"),
        *SEEN[3:],
    ]
    found = erasure.comparisons(CASES, after, before, [Seen("robot", "flat"), Seen("star", "sketch")], ["robot"])
    assert (found["kept"].hits, found["kept"].n) == (2, 3)  # the star became a moon
    assert (found["attributes"].hits, found["attributes"].n) == (9, 10)
    assert (found["negative"].hits, found["negative"].n) == (1, 2)


def test_the_negative_prompt_names_what_was_erased():
    pipe = Painter()
    erasure.evaluate(pipe, judge, CASES, [("robot",)], methods={"nothing": contextmanager(lambda pipe, _: iter([{}]))},
                     negative=True, words="withheld")  # fmt: skip
    asked = [(prompts, call["negative_prompt"]) for prompts, _, call in pipe.calls if "negative_prompt" in call]
    assert asked == [(("a", "b"), ["robot", "robot"])] * 2


def test_evaluate_refuses_before_it_paints():
    pipe = Painter()
    with pytest.raises(MembraneError, match="moon"):
        erasure.evaluate(pipe, judge, CASES, [("robot",), ("moon",)], methods={"perfect": perfect})
    assert not pipe.calls


def test_finished_runs_are_not_made_again(tmp_path):
    file = tmp_path / "sub" / "runs.jsonl"
    first, second, third = Painter(), Painter(), Painter()

    def run(pipe, settings):
        return erasure.evaluate(
            pipe, judge, CASES, [("robot",)], methods={"perfect": perfect}, finished=Store(file, "evaluate", settings)
        )

    expected = run(first, {"steps": 1})
    assert run(second, {"steps": 1}) == expected and not second.calls
    assert run(third, {"steps": 2}) == expected and len(third.calls) == len(first.calls)
