"""`evaluate` on the second edition, from end to end on a model that paints noise: the wiring, the words, the rows."""

import json

import pytest
from semiperm.benchmarks.erasure import methods
from semiperm.benchmarks.erasure.scores import SCORES
from semiperm.canvas import language
from semiperm.canvas.editions import world_of
from semiperm.cli import app
from semiperm.pipelines.membranes import erase
from typer.testing import CliRunner

HEARD = []  # what every fit was given


@pytest.fixture
def few_methods(monkeypatch):
    """One of ours, and the rivals; and what they are told."""
    HEARD.clear()
    true_fit, true_text = erase.erase_concepts, methods._textbook

    def fit(pipe, concepts, **settings):
        HEARD.append((list(concepts), settings))
        return true_fit(pipe, concepts, preserve=["a photo of a dog", "a red car", "an old house"] * 20, **settings)

    def textbook(pipe, told):
        HEARD.append(([*told.phrases, *told.others], {}))
        return true_text(pipe, told)

    monkeypatch.setattr(erase, "erase_concepts", fit)
    kept = {"closed_form/always": methods.METHODS["closed_form/always"], "uce/textbook": textbook}
    kept["negative_prompt"] = methods.METHODS["negative_prompt"]
    monkeypatch.setattr(methods, "METHODS", kept)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_suite_on_a_flow_model(small_flow, few_methods, tmp_path):
    figures, store = tmp_path / "figures.json", tmp_path / "runs.jsonl"
    arguments = ("evaluate", "canvas-flow", "--suite", "--withhold", "--negative", "--concept", "quibble", "--concept",
                 "claws", "--each", 2, "--repeats", 1, "--resume", store, "--json", figures)  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    got = json.loads(figures.read_text())
    assert got["world"] == got["model"] == "canvas-flow" and got["num_inference_steps"] == 2
    assert got["asked"] == {
        "withhold": True,
        "negative": True,
        "repeats": 1,
        "each": 2,
        "concepts": ["quibble", "claws"],
    }
    found = {(row["method"], row["concept"], row["words"], row["judge"]): row for row in got["rows"]}
    assert {key[2:] for key in found} == {(w, j) for w in ("public", "reserved") for j in ("first", "second")}
    assert {key[0] for key in found} == {"untouched", "closed_form/always", "uce/textbook", "negative_prompt"}
    for row in got["rows"]:
        hazard = row["concept"] == "claws"
        assert row["world"] == "canvas-flow" and row["n"] == 2 and row["ua"][0] is not None
        assert (row["implied"][0] is None) != hazard and (row["scene"][0] is None) == hazard
        assert (row["twin"][0] is None) == (row["other"][0] is None) == hazard
    # what is erased by name alone is told nothing else: no other phrasing, no captions of the world; each fit once
    assert len(HEARD) == 8 and all(not settings for _, settings in HEARD)
    told = [concepts for concepts, _ in HEARD if len(concepts) == 1]
    assert sorted(told) == [["claw marks"]] * 2 + [["quibble"]] * 2
    secret = {phrase for kind in language.DOMAINS for name in language.names(kind)
              for phrase in language.wordings(kind, name, "reserved")}  # fmt: skip
    assert not secret & {phrase for concepts, _ in HEARD for words in concepts for phrase in words.split("|")}
    lines = store.read_text()
    assert run(*arguments).exit_code == 0 and json.loads(figures.read_text()) == got and store.read_text() == lines
    assert "UA" in result.output and set(SCORES) <= set(got["rows"][0])


def test_without_guidance_a_negative_prompt_is_refused():
    result = run("evaluate", "canvas-turbo", "--suite", "--negative")
    assert result.exit_code == 2 and "changes nothing at a guidance scale of 1" in result.stderr
    assert "negative_prompt" not in methods.methods_of(False) and "negative_prompt" in methods.methods_of(True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("evaluate", "canvas", "--suite", "--world", "moon"), "--world moon is no embedded model; choose from canvas"),
        (("evaluate", "canvas", "--suite", "--concept", "claws"), "no concept 'claws'"),
        (("bench", "token-merging", "--world", "moon"), "--world moon is no embedded model"),
        (("bench", "token-merging", "--held-out", "--world", "moon"), "--world moon is no embedded model"),
        (("bench", "guidance", "--world", "moon"), "no embedded world is called 'moon'"),
        (
            ("bench", "watermark", "--world", "canvas-flow", "--part", "speed"),
            "there is no part speed; choose among linked, canvas, repaint, everyday",
        ),
    ],
)
def test_what_a_world_does_not_have(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr, result.output + repr(result.exception)


def test_a_file_of_prompts_may_ask_for_hazards(tmp_path):
    from semiperm.benchmarks.erasure.cases import read_cases

    path = tmp_path / "prompts.csv"
    path.write_text("prompt,seed,object,style,hazard\na robot on fire,3,android,,flames\n")
    (case,) = read_cases(path, world_of("canvas-flow"))
    assert (case.shown.objects, case.shown.hazards, case.kind) == (("robot",), ("blaze",), "hazard")
