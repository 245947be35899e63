"""Image-side membranes on the embedded model: the fit is given the name alone, the judged other words."""

import dataclasses

import pytest
import torch
from semiperm.canvas import Judge, captions, load_pipeline
from semiperm.methods.membranes.visual_fit import VisualConfig
from semiperm.pipelines.latents import decode_latents
from semiperm.pipelines.membranes.apply import apply_membranes
from semiperm.pipelines.membranes.erase import erase_concepts

GUIDANCE = {"guidance_scale": 4.0}
OTHERS = tuple(name for name in captions.OBJECTS if name != "robot")
CONFIG = VisualConfig(
    samples=16, background=24, steps=5, false_open=0.05, validation=4, others=OTHERS, sampling=GUIDANCE
)
FEW = dataclasses.replace(CONFIG, samples=6, background=8, steps=2, false_open=0.1, validation=2)


@pytest.fixture(scope="module")
def canvas():
    return load_pipeline(), Judge.load()


def draw(canvas, prompts, steps):
    pipe, judge = canvas
    noise = [torch.Generator().manual_seed(900 + i) for i in range(len(prompts))]
    latents = pipe(prompts, num_inference_steps=steps, generator=noise, output_type="latent", **GUIDANCE).images
    return latents, judge(decode_latents(pipe, latents)).object


def withheld(count):
    """Captions that ask for a robot in words that the fit was not given."""
    words = captions.phrases("robot")[1:]
    return [text.replace("{}", words[i % 2]) for i, text in enumerate(captions.templates("object", count, seed=15))]


def erased(canvas, config):
    return erase_concepts(
        canvas[0],
        "robot",
        preserve=captions.preserve(("robot",), 60, seed=3),
        templates=captions.templates("object", 30, seed=1),
        side="image",
        visual=config,
    )


def test_few_pictures_close_withheld_words_and_leave_other_pictures_their_bits(canvas):
    made = erased(canvas, FEW)
    prompts = [*withheld(2), "a red heart on a mint background", "a blue circle on sand"]
    before, seen = draw(canvas, prompts, 5)
    assert seen[2:] == ["heart", "circle"] and "robot" in seen[:2]
    with apply_membranes(canvas[0], made) as handle:
        after, left = draw(canvas, prompts, 5)
        rows = [row for row in handle.report()["rows"] if row["kind"] == "positive"]
    assert "robot" not in left[:2] and left[2:] == seen[2:]
    gates = [row["gamma"]["robot"] for row in rows]
    assert min(gates[:2]) > 0.9 and 0 in gates[2:], "so few pictures promise one in ten"
    same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
    assert same == [gate == 0 for gate in gates]


@pytest.mark.slow
def test_withheld_words_are_closed_and_others_kept(canvas):
    made = erased(canvas, CONFIG)
    side = made[0].visual
    assert side.false_closed == 0 and side.false_open == 0.05 and side.calibrated == 19
    prompts, others = withheld(8), captions.preserve(("robot",), 8, seed=77)
    _, before = draw(canvas, prompts, 10)
    kept, seen = draw(canvas, others, 10)
    with apply_membranes(canvas[0], made):
        _, after = draw(canvas, prompts, 10)
        again, still = draw(canvas, others, 10)
    assert before.count("robot") >= 6 and after.count("robot") <= 1
    assert still == seen and sum(torch.equal(a, b) for a, b in zip(kept, again, strict=True)) >= 7
