"""An adversary's prompts against methods at work, from end to end on a model that paints noise; and how hard it is."""

import json

import pytest
import torch
from semiperm.benchmarks.guidance import attacked, judged, methods, worlds
from semiperm.benchmarks.guidance.attacked import Attack, Attacker
from semiperm.benchmarks.guidance.methods import Work
from semiperm.canvas.editions import world_of
from semiperm.cli import app
from semiperm.methods.errors import SemipermError
from semiperm.methods.guidance.nag import NAG
from semiperm.pipelines.guidance.apply import SafeGuidanceHandle
from semiperm.pipelines.text import encode_text
from typer.testing import CliRunner

LITTLE = Attack(searches=1, steps=2, learned_steps=2, targets=2, points=1, tokens=3)


def kept(key, make):
    return make()


def test_what_is_found_names_no_hazard_and_stands_before_harmless_prompts(small_flow):
    world = world_of("canvas-flow")
    work = Work(small_flow, world, {"num_inference_steps": 2, "guidance_scale": 4.0})
    keys = []
    asked = Attacker(work, LITTLE, 0, lambda key, make: (keys.append(key), make())[1]).asked(2)
    hazards = world.names("hazard")
    assert len(asked) == 2 * 2 * len(hazards) and len(set(keys)) == len(keys) == 2 * len(hazards)
    counted = attacked.attacks_of(hazards, 2, LITTLE)
    assert [(one.kind, one.hazard) for one in asked] == [(one.kind, one.hazard) for one in counted]
    assert [len(part) for part in methods.parts_of(asked, range(len(asked)))] == [
        len(part) for part in methods.parts_of(counted, range(len(counted)))
    ]
    banned = {phrase for name in hazards for phrase in (*world.phrases(name), *world.reserved(name))}
    for one in asked:
        words = one.prompt.split()
        assert one.shown.hazards == (one.hazard,) and one.shown.objects
        assert (one.learned is None) == (one.kind == attacked.FOUND)
        if one.kind == attacked.FOUND:
            assert not banned & set(words[:3])
        else:  # nobody else says the words that stand for it
            ids, tokens = one.learned
            assert len(set(ids)) == 3 == len(tokens) and not set(words[:3]) & set(words[3:])
    again = Attacker(work, LITTLE, 0, kept).asked(2)
    assert [one.prompt for one in again] == [one.prompt for one in asked]


def test_nag_takes_the_values_that_were_published_for_the_family(small_flow):
    world = world_of("canvas-flow")
    work = Work(small_flow, world, {"num_inference_steps": 2, "guidance_scale": 4.0})
    with work.on(worlds.categories_of(world)[:1], (NAG(),)):
        (used,) = SafeGuidanceHandle.on(small_flow).config.algorithms
    assert used == NAG("sd3") != NAG()


def test_learned_words_say_something_else_inside_alone(small_flow):
    from semiperm.pipelines.attacks.encoding import OpenEncoder, learned_words

    encoder = OpenEncoder(small_flow, 1)
    (first, second) = encoder.allowed()[:2].tolist()
    said, other = encoder.text_of([first]), encoder.text_of([second])
    prompts = [f"{said} {other}", f"{other} {other}"]
    before = encode_text(small_flow, prompts).hidden
    with learned_words(small_flow, [first], encoder.table[[second]]):
        inside = encode_text(small_flow, prompts).hidden
    assert torch.equal(encode_text(small_flow, prompts).hidden, before)
    assert torch.equal(inside[1], before[1])
    torch.testing.assert_close(inside[0], before[1], atol=1e-5, rtol=1e-4)  # it says what the other word says
    with (
        pytest.raises(SemipermError, match="no token twice"),
        learned_words(small_flow, [first] * 2, encoder.table[:2]),
    ):
        pass


def test_the_command_attacks_each_method_at_work(small_flow, monkeypatch, tmp_path):
    monkeypatch.setattr(worlds, "BENIGN", "benign")
    little = lambda *_: LITTLE  # noqa: E731
    monkeypatch.setattr(attacked, "Attack", little)
    figures, store = tmp_path / "figures.json", tmp_path / "runs.jsonl"
    chosen = ("untouched", "SAFREE and SLD strong")
    arguments = ["bench", "guidance", "--world", "canvas-flow", "-n", "2", "--attacks", "1", "--resume", str(store)]
    arguments += ["--json", str(figures), *(word for name in chosen for word in ("--method", name))]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    got = json.loads(figures.read_text())
    assert got["attack"] == vars(LITTLE)
    rows = {(row["method"], row["categories"], row["kind"], row["category"], row["judge"]): row for row in got["rows"]}
    found, _, own_found, _ = attacked.KINDS
    for judge in ("first", "second"):
        assert rows["untouched", "all", found, "", judge]["n"] == 8
        assert ("untouched", "all", own_found, "", judge) not in rows  # nothing is at work there
        for kind in attacked.KINDS:
            assert rows["SAFREE and SLD strong", "all", kind, "frost", judge]["n"] == 2
    assert {categories for _, categories, *_ in rows} == {"all"}
    lines = store.read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert json.loads(figures.read_text()) == got and store.read_text() == lines


def test_as_many_steps_as_are_counted(small_flow):
    done = []
    judged.run("canvas-flow", 2, ("untouched", "NAG"), progress=lambda: done.append(1), attack=LITTLE)
    assert len(done) == judged.batches("canvas-flow", 2, ("untouched", "NAG"), LITTLE)


def test_no_attack_without_effort():
    with pytest.raises(SemipermError, match="steps=0 of an attack; expected a whole number, at least 1"):
        Attack(steps=0)
