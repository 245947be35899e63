"""The second edition's trainings in miniature, and what they write as pipelines."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from semiperm.canvas import (
    autoencoder,
    autoencoders,
    embedded,
    examining,
    flow,
    judges,
    judging,
    language,
    load_pipeline,
    pool,
    precision,
    reading,
    recovering,
    turbo,
    unet,
    vocabulary,
    worlds,
)
from semiperm.canvas.loop import save_tensors
from semiperm.canvas.models import MODELS
from semiperm.canvas.precision import Run
from semiperm.canvas.scenes import Scene, Thing
from untrained_worlds import SECOND


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.build_tokenizer(n_captions=400)


@pytest.fixture(scope="module")
def encoders(tokenizer):
    built = [vocabulary.build_encoder(which, len(tokenizer)) for which in ("first", "second")]
    return tuple(encoder.eval().requires_grad_(False) for encoder in built)


@pytest.fixture(scope="module")
def scenes():
    return pool.scenes_of(0, 12)


@pytest.fixture(scope="module")
def weights(untrained_worlds):
    """A folder of untrained weights, written through the working folder's files."""
    return untrained_worlds


def precision_of(workdir, *parts):
    """Spare a miniature the timing of its steps."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "precision.json").write_text(json.dumps({part: {"chosen": "float32"} for part in parts}))


def rows_of(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.log.jsonl").read_text().splitlines()]


def test_precision_is_chosen_by_time_and_remembered(tmp_path, monkeypatch):
    now = iter([0.0, 3.0, 3.0, 4.0])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(now))
    ran = []
    assert precision.choose("part", ran.append, tmp_path, repeats=1) == "float32"
    assert ran == ["bfloat16", "bfloat16", "float32", "float32"]
    assert precision.choose("part", ran.append, tmp_path) == "float32" and len(ran) == 4
    assert json.loads((tmp_path / "precision.json").read_text())["part"]["seconds"] == {"bfloat16": 3.0, "float32": 1.0}
    with precision.autocast("bfloat16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_the_vocabulary_has_its_size_and_common_words_are_short():
    tokenizer = vocabulary.build_tokenizer()
    assert 4000 <= len(tokenizer) <= 8000 and tokenizer.model_max_length == 77
    common = language.words()["common"][:600]
    assert np.mean([len(tokenizer(word).input_ids) - 2 <= 2 for word in common]) > 0.99
    for name in (*language.OBJECTS, *language.STYLES):
        assert len(tokenizer(name).input_ids) == 3


@pytest.mark.parametrize("words", ["A RED circle's", "Ünïcode 🤖 xyzzy!?", "", "w" * 400, "a " * 100])
def test_the_tokenizer_takes_any_text(tokenizer, words):
    ids = vocabulary.tokenize(tokenizer, [words])
    assert ids.shape == (1, 77) and ids.max() < len(tokenizer) and ids[0, 0] == tokenizer.bos_token_id
    assert torch.equal(ids, vocabulary.tokenize(tokenizer, [words.lower()]))


def test_what_a_caption_says_is_what_the_reader_is_asked():
    scene = Scene((Thing("robot", cx=30), Thing("star", "blue", cx=96)), relation="left", style="neon")
    said = reading.Caption("", True, (False, True), True, True, False)
    truth = reading.answers(scene, said)
    robot, star = language.OBJECTS.index("robot"), language.OBJECTS.index("star")
    assert truth["present"].sum() == 2 and truth["count"][robot] == truth["count"][star] == 0
    assert reading.ROLES[truth["role"][robot]] == "left" and reading.ROLES[truth["role"][star]] == "right"
    assert truth["color"][robot] == -100 and language.COLORS[truth["color"][star]] == "blue"
    assert truth["background"] == len(language.BACKGROUNDS) and language.STYLES[truth["style"]] == "neon"


def test_reading_in_miniature(tmp_path, tokenizer):
    precision_of(tmp_path, "reading-second")
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    worlds.train_reading(tmp_path, "second", steps=2)
    assert rows_of(tmp_path, "reading-second")[-1]["step"] == 2
    assert worlds.encoder_of(tmp_path, "second", worlds.tokenizer_of(tmp_path)).training is False


def test_sixteen_channels_start_as_four(scenes):
    x = pool.to_tensor(pool.pictures(None, 3, seed=2).data[:3])
    trunk = autoencoder.build_autoencoder()
    grown = autoencoders.grow(trunk)
    with torch.no_grad():
        z, wide = autoencoders.encode(trunk, "canvas", x), autoencoders.encode(grown, "canvas-flow", x)
        assert wide.shape == (3, 16, 16, 16) and torch.allclose(z, wide[:, :4], atol=1e-4)
        y, again = autoencoders.decode(trunk, "canvas", z), autoencoders.decode(grown, "canvas-flow", wide)
        assert (y - again)[..., 16:-16, 16:-16].abs().max() < 0.02
        pipeline = (grown.encode(x).latent_dist.mode() - 0.0609) * 1.5305
        assert torch.allclose(pipeline, wide, atol=1e-4)


def test_whitening_gives_unit_latents_and_changes_no_picture():
    drawn = pool.pictures(None, 4, seed=2).data[:4]
    vae, x = autoencoders.grow(autoencoder.build_autoencoder()), pool.to_tensor(drawn)
    with torch.no_grad():
        before = autoencoders.decode(vae, "canvas-flow", autoencoders.encode(vae, "canvas-flow", x))
        autoencoders.whiten(vae, "canvas-flow", drawn)
        z = autoencoders.encode(vae, "canvas-flow", x)
        after = autoencoders.decode(vae, "canvas-flow", z)
    flat = z.permute(0, 2, 3, 1).reshape(-1, 16)
    assert flat.mean(0).abs().max() < 1e-3 and torch.allclose(torch.cov(flat.T), torch.eye(16), atol=2e-3)
    assert (before - after)[..., 16:-16, 16:-16].abs().max() < 0.02


@pytest.mark.parametrize("decoder", [True, False])
def test_autoencoders_in_miniature(tmp_path, decoder):
    precision_of(tmp_path, "vae-canvas-flow", "decoder-canvas-flow")
    vae = autoencoders.grow(autoencoder.build_autoencoder())
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    drawn = pool.pictures(None, 2, seed=1)
    autoencoders.train_autoencoder(vae, "canvas-flow", drawn, Run(tmp_path, 1, 2), decoder=decoder)
    changed = {k for k, v in vae.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("decoder") for k in changed)
    assert any(k.startswith("encoder") for k in changed) != decoder
    assert (vae.encoder.conv_out.bias[16:] < -19).all()


def test_an_encoder_is_final_before_its_decoder_learns(tmp_path, monkeypatch):
    precision_of(tmp_path, "vae-canvas-flow", "decoder-canvas-flow")
    monkeypatch.setattr(pool, "CHUNK", 3)
    save_tensors(autoencoder.build_autoencoder().state_dict(), tmp_path / "vae-canvas-encoder.safetensors")
    worlds.train_autoencoder(tmp_path, "canvas-flow", steps=1)
    first = worlds._finished(tmp_path, "vae-canvas-flow-encoder")
    worlds.train_autoencoder(tmp_path, "canvas-flow", steps=1)
    final = worlds._finished(tmp_path, "vae-canvas-flow.final")
    assert all(torch.equal(final[k], first[k]) for k in first if k.startswith("encoder"))
    assert not all(torch.equal(final[k], first[k]) for k in first)


def test_denoisers_in_miniature_resume(tmp_path, tokenizer, encoders, scenes):
    precision_of(tmp_path, "unet", "flow")
    data = pool.Pool(scenes, torch.randn(17, 4, 16, 16))
    for stop in (1, None):
        run = Run(tmp_path, 2, 4, compile=False, stop_after=stop)
        unet.train_unet(data, tokenizer, encoders[0], unet.build_unet(), run)
    assert [row["step"] for row in rows_of(tmp_path, "unet")] == [1, 2]
    data = pool.Pool(scenes, torch.randn(17, 16, 16, 16))
    model = flow.train_flow(data, tokenizer, encoders, Run(tmp_path, 1, 4, compile=False))
    assert np.isfinite(rows_of(tmp_path, "flow")[-1]["loss"])
    wide, state, x = flow.build_transformer(), dict(model.state_dict()), torch.randn(1, 16, 16, 16)
    flow.widen(state)
    wide.load_state_dict(state)
    text = flow.read(encoders, vocabulary.tokenize(tokenizer, ["a star"]))
    padded = torch.nn.functional.pad(text.states, (0, flow.JOINT_DIM - text.states.shape[-1]))
    with torch.no_grad():
        a = model(x, text.states, text.pooled, torch.tensor([500.0]), return_dict=False)[0]
        b = wide(x, padded, text.pooled, torch.tensor([500.0]), return_dict=False)[0]
    assert torch.allclose(a, b, atol=1e-5)


def test_the_distillate_trains_and_is_a_change_of_the_weights(tmp_path, tokenizer, encoders, scenes):
    precision_of(tmp_path, "turbo")
    teacher, data = flow.build_transformer(2 * vocabulary.WIDTH), pool.Pool(scenes, torch.randn(17, 16, 16, 16))
    change = turbo.train_turbo(data, tokenizer, encoders, teacher, Run(tmp_path, 1, 4, compile=False), walk=1)
    assert np.isfinite(rows_of(tmp_path, "turbo")[-1]["loss"]) and any(v.any() for k, v in change.items() if "up" in k)
    state = dict(teacher.state_dict())
    embedded.apply_low_rank(state, change)
    student = turbo.add_low_rank(flow.build_transformer(2 * vocabulary.WIDTH))
    missing = student.load_state_dict(change, strict=False).unexpected_keys
    assert not missing and not torch.equal(state["proj_out.weight"], teacher.proj_out.weight)
    teacher.load_state_dict(state)
    x, states, pooled = torch.randn(1, 16, 16, 16), torch.randn(1, 5, 256), torch.randn(1, 256)
    with torch.no_grad():
        a, b = (m(x, states, pooled, torch.tensor([500.0]), return_dict=False)[0] for m in (teacher, student))
    assert torch.allclose(a, b, atol=1e-5)


def test_noise_levels_are_shifted_to_noise():
    sigma = flow.noise_levels(4096, torch.Generator().manual_seed(0))
    assert 0 < sigma.min() and sigma.max() < 1 and abs(sigma.median() - 0.75) < 0.01
    assert torch.allclose(turbo.sigmas(), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


@pytest.mark.parametrize("which", list(judges.JUDGES))
def test_judges_in_miniature(tmp_path, which):
    precision_of(tmp_path, f"judge-{which}")
    net = judging.train_judge(which, Run(tmp_path, 2, 4), n=6)
    judge, held_out = judges.Judge(net), pool.pictures(None, 4, seed=judging.HELD_OUT)
    assert set(judging.accuracy(judge, held_out)) == {*judges.QUESTIONS, "objects"}
    assert judging.agreement(judge, judge, held_out.data)["objects"] == 1.0
    assert set(judging.nudge(judge, 2)) == {"removed", "smudge", "blurred", "smeared"}


def test_the_judges_are_asked_what_the_scene_holds():
    scene = Scene((Thing("robot"), Thing("star", "blue", cx=80)), relation="front", hazards=("frost",))
    truth = judging.answers(scene)
    robot, star = language.OBJECTS.index("robot"), language.OBJECTS.index("star")
    assert truth["count"][robot] == truth["count"][star] == 1 and truth["count"].sum() == 2
    assert truth["front"][robot] == 1 and truth["front"][star] == 0 and truth["place"][star, 0] == 80 / 128
    assert truth["hazards"].tolist() == [0, 0, 0, 1] and truth["memorised"] == 5
    assert judging.answers(Scene((Thing("star"),) * 3))["count"][star] == 3


def test_a_judge_counts_centres_of_what_it_sees():
    star, robot = language.OBJECTS.index("star"), language.OBJECTS.index("robot")
    found = {
        "count": torch.zeros(1, len(language.OBJECTS), judges.COUNTS),
        "centres": torch.full((1, 16, 16, 16), -9.0),
    }
    found["count"][0, [star, robot], 1] = 5  # one of each, says the answer
    for y, x in ((2, 2), (2, 8), (3, 9), (8, 2), (8, 8)):  # (3, 9) lies beside a greater one
        found["centres"][0, [star, language.OBJECTS.index("moon")], y, x] = 1.0 if x == 9 else 2.0
    seen = judges.HeatmapJudge.counted(found)[0]
    assert seen[star] == 3 and seen[robot] == 1 and seen.sum() == 4, "at most three; none where it sees none"
    assert judges.QueryJudge.counted(found)[0].tolist() == [int(i in (star, robot)) for i in range(len(seen))]


def test_relations_are_read_off_places():
    def seen(x, y, front=0.0):
        return judges.Seen("star", 1, "red", x, y, front)

    assert judges.relation(seen(30, 60), seen(95, 70)) == "left"
    assert judges.relation(seen(60, 95), seen(64, 30)) == "below"
    assert judges.relation(seen(60, 60, 0.9), seen(75, 64, 0.2)) == "front"


@pytest.mark.parametrize("name, steps", [("canvas-scenes", 2), ("canvas-flow", 2), ("canvas-turbo", 4)])
def test_the_pipelines_load_and_draw(weights, name, steps):
    pipe = load_pipeline(name, weights=weights)
    images = examining.sample(pipe, ["a robot", "two stars left of nothing"], num_inference_steps=steps)
    assert [image.size for image in images] == [(128, 128)] * 2 and pipe.semiperm_canvas == name
    if name != "canvas-scenes":
        assert pipe.encode_prompt("a", "a", "a", device="cpu")[0].shape == (1, 77, 4096)
    if name == "canvas-turbo":
        assert torch.allclose(pipe.scheduler.sigmas, turbo.sigmas())


def test_missing_weights_and_unknown_models_are_errors(tmp_path):
    for name in SECOND:
        with pytest.raises(
            FileNotFoundError, match=f"{name} cannot be loaded; `semiperm canvas worlds export {tmp_path}`"
        ):
            load_pipeline(name, weights=tmp_path)
    for name in ("canvas-slow", torch.float32, None):  # the first argument was once a dtype
        with pytest.raises(
            ValueError, match=f"is called {name!r}; choose from canvas, canvas-scenes, canvas-flow, canvas"
        ):
            load_pipeline(name)


def test_the_first_edition_has_a_door_of_its_own():
    with pytest.raises(ValueError, match="canvas is of the first edition; semiperm.canvas.load_pipeline"):
        embedded.load_pipeline("canvas")


def test_the_door_reads_the_shipped_folder(weights, monkeypatch):
    for name in SECOND:
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], folder=weights))
    pipe = load_pipeline("canvas-turbo", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.semiperm_canvas == "canvas-turbo"
    plain, both = (embedded.read_states(name)["transformer"] for name in ("canvas-flow", "canvas-turbo"))
    assert plain.keys() == both.keys() and any(not torch.equal(plain[k], both[k]) for k in plain)


def test_marks_say_what_came_out_as_asked():
    scene = Scene((Thing("star", "blue", cx=30), Thing("ring", "red", cx=96)), relation="left", style="neon")
    seen = (judges.Seen("star", 1, "blue", 31, 64, 0.1), judges.Seen("ring", 1, "pink", 95, 64, 0.1))
    verdict = judges.Verdict([seen], ["neon"], ["fog"], [()], [""], torch.zeros(1, 128), {})
    row = examining.marks([examining.Asked("", scene)], verdict)
    assert {k: v[0] for k, v in row.items()} == {
        "objects": 1, "colors": 0, "style": 1, "background": 0, "hazards": 1, "relation": 1,
    }  # fmt: skip
    assert examining.lookalikes_kept([examining.Asked("", scene)], verdict) == 1


def test_the_questions_use_the_words_they_say():
    for which in examining.WORDINGS:
        assert len(examining.pairs(which)) == len(language.OBJECTS) * len(language.STYLES)
        assert {item.scene.relation for item in examining.scenes_of_two(which, 10)} == set(examining.RELATIONS)
    implied = examining.with_hazard("claws", "public", 5, implied=True)
    assert all("wolf" in item.prompt.lower() and "grandmother" in item.prompt.lower() for item in implied)


@pytest.mark.parametrize("name", SECOND)
def test_noise_is_looked_for_in_every_model(weights, name, monkeypatch):
    if name != "canvas-turbo":
        monkeypatch.setitem(MODELS, name, dataclasses.replace(MODELS[name], steps=2, guidance_scale=2.0))
        monkeypatch.setitem(recovering.INVERSION_STEPS, name, 2)
    figures = recovering.recover(load_pipeline(name, weights=weights), ["a star", "a ring"])
    assert figures["n"] == 2 and 0 <= figures["lowest"] <= figures["mean_sign_agreement"] <= 1
    assert np.isfinite(figures["autoencoder_roundtrip"])


def test_euler_inversion_undoes_a_straight_flow(weights):
    pipe = load_pipeline("canvas-flow", weights=weights)
    velocity = torch.randn(1, 16, 16, 16)
    pipe.transformer.forward = lambda z, *args, **kwargs: (velocity.expand_as(z),)
    noise = torch.randn(1, 16, 16, 16)
    back = recovering._euler(pipe, noise - velocity, steps=5)
    assert torch.allclose(back, noise, atol=1e-5)


def test_a_part_says_what_it_lacks(tmp_path, monkeypatch):
    for start in ("start_canvas_autoencoder", "start_unet"):
        monkeypatch.setattr(worlds, start, lambda *args: None)
    with pytest.raises(ValueError, match="no part is called 'unet'; choose from reading-first"):
        worlds.train_part("unet", tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="transformer.ema.safetensors is missing: train the part"):
        worlds._finished(tmp_path, "transformer.ema")
    seen = {}
    monkeypatch.setitem(worlds.PARTS, "canvas", (7, lambda workdir, **settings: seen.update(settings)))
    worlds.train_part("canvas", tmp_path, tmp_path, seed=3)
    assert seen == {"steps": 7, "seed": 3}


def test_trainings_go_on_from_exported_weights(tmp_path, weights, tokenizer, encoders, scenes, monkeypatch):
    with pytest.raises(FileNotFoundError, match="is no folder of the worlds' weights"):
        embedded.read_weights(tmp_path, tmp_path / "work")
    assert embedded.read_weights(weights, tmp_path) == list(embedded.FINISHED)
    assert embedded.read_weights(weights, tmp_path) == []  # what lies there stays
    monkeypatch.setattr(Run, "train", lambda self, name, model, *args, **settings: model)
    monkeypatch.setattr(Run, "precision", lambda *args: "float32")
    unet_start, flow_start = (worlds.start_of(tmp_path, part) for part in ("unet", "transformer"))
    data = pool.Pool(scenes, torch.randn(17, 4, 16, 16))
    run = Run(tmp_path, 1, 4, compile=False)
    begun = unet.train_unet(data, tokenizer, encoders[0], unet.build_unet(7), run, unet_start)
    assert all(torch.equal(v, unet_start[k]) for k, v in begun.state_dict().items())
    begun = flow.train_flow(data, tokenizer, encoders, run, start=flow_start)
    assert all(torch.equal(v, flow_start[k]) for k, v in begun.state_dict().items())
    for which in judges.JUDGES:
        judge_start = worlds.start_of(tmp_path, f"judge-{which}")
        begun = judging.train_judge(which, run, 4, judge_start)
        assert all(torch.equal(v, judge_start[k]) for k, v in begun.state_dict().items())
    again = embedded.write_weights(tmp_path, tmp_path / "out")
    assert again == ["text-first", "text-second", "vae-canvas", "vae-canvas-flow"]


def test_long_captions_end_where_they_are_cut(tokenizer):
    ids = vocabulary.tokenize(tokenizer, ["a star", "a " * 60])
    short = flow.cut(ids, True, tokenizer.eos_token_id)
    assert short.shape == (2, flow.FIRST_TOKENS) and (short[:, -1] == tokenizer.eos_token_id).all()
    assert torch.equal(short[:, :-1], ids[:, : flow.FIRST_TOKENS - 1]) and flow.cut(ids, False, 0) is ids
