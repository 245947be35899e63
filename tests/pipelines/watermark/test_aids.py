"""What helps to read one model's marks, made by the model: weights of channels, and the training of a reader."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from semiperm.canvas.precision import PRECISIONS
from semiperm.methods.files import read_safetensors
from semiperm.methods.watermark.aids import aids_of_model
from semiperm.methods.watermark.ladder import LADDER
from semiperm.methods.watermark.reader import model_fingerprint
from semiperm.pipelines.watermark import channels as channel_module
from semiperm.pipelines.watermark import reader as reader_module
from semiperm.pipelines.watermark.channels import measure_channels
from semiperm.pipelines.watermark.fingerprint import fingerprint
from semiperm.pipelines.watermark.reader import Schedule, train_reader
from untrained_worlds import small_flow


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return small_flow()


def test_channels_are_measured_by_what_inversion_gives_back(pipe, monkeypatch):
    """Latents that give four channels back whole and the others not at all."""
    seen, asked = [], []

    def draw(pipe, prompts, noise, steps, guidance_scale):
        seen.append(noise)
        asked.extend(prompts)
        return torch.zeros(len(noise), 3, 128, 128)

    def invert(pipe, latents, steps, batch_size):
        other = torch.randn(seen[-1].shape, generator=torch.Generator().manual_seed(len(seen)))
        strong = (torch.arange(16) < 4)[:, None, None]
        return torch.where(strong, seen[-1], other)

    monkeypatch.setattr(channel_module, "drawn", draw)
    monkeypatch.setattr(
        channel_module, "encode_images", lambda pipe, pixels, size: torch.zeros(len(pixels), 16, 16, 16)
    )
    monkeypatch.setattr(channel_module, "invert", invert)
    done = []
    found = measure_channels(pipe, "prompt {}".format, pictures=10, advance=done.append)
    assert tuple(found.correlations) == LADDER and sum(done) == 10 and found.model == fingerprint(pipe)
    assert asked == [f"prompt {i}" for i in range(10)] and not torch.equal(seen[0][:2], seen[1])
    for one in found.correlations.values():
        assert one[:4].min() > 0.9 and one[4:].abs().max() < 0.15


def test_a_fingerprint_is_of_the_weights_alone(pipe):
    weights = pipe.transformer.state_dict(), pipe.vae.state_dict()
    half = [{name: value.half() for name, value in part.items()} for part in weights]
    assert fingerprint(pipe) == model_fingerprint(*weights)
    assert aids_of_model({}, lambda: "") == {}
    assert (int(model_fingerprint(*half), 16) ^ int(fingerprint(pipe), 16)).bit_count() <= 2


def test_a_readers_training_goes_on_where_it_stopped_and_says_its_precision(pipe, tmp_path, monkeypatch):
    schedule, out, drawn = Schedule(pictures=16, steps=3, sampling=((2, 1.0),)), tmp_path / "reader.safetensors", []
    whole = reader_module.drawn
    monkeypatch.setattr(reader_module, "drawn", lambda *a: drawn.append(1) or whole(*a))
    _, precision = train_reader(pipe, "a robot {}".format, out, tmp_path / "work", schedule)
    assert precision in PRECISIONS and len(drawn) == 1
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["about"])["precision"] == precision
    timed = json.loads((tmp_path / "work" / "precision.json").read_text())
    (record,) = timed.values()
    assert record["chosen"] == precision and set(record["seconds"]) == set(PRECISIONS)
    first = read_safetensors(out)[0]
    out.unlink()
    again = SimpleNamespace(transformer=pipe.transformer, vae=pipe.vae)  # nothing is drawn or trained once more
    reader, _ = train_reader(again, "a robot {}".format, out, tmp_path / "work", schedule)
    second = read_safetensors(out)[0]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert len(drawn) == 1 and reader.channels == 16 and reader.model == fingerprint(pipe)
    assert aids_of_model({"reader": out}, lambda: fingerprint(pipe)).keys() == {"reader"}
    longer = Schedule(pictures=16, steps=6, sampling=((2, 1.0),))
    train_reader(again, "a robot {}".format, out, tmp_path / "work", longer)
    assert any(not torch.equal(first[name], value) for name, value in read_safetensors(out)[0].items())
