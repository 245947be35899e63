"""The sampling benchmark reports what it promises, refuses wrong answers, and its peer is the released formula."""

import json

import pytest
import torch
from semiperm.benchmarks.token_merging import sampling as bench
from semiperm.methods.errors import TokenMergingError
from semiperm.pipelines.family import denoiser_of
from tiny_models import build


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_rows(family):
    pipe = build(family)
    if family == "flux":
        pipe.default_sample_size = 16  # its own 128 is 4,096 tokens here: forty seconds
    forwards = [m.__dict__.get("forward") for m in denoiser_of(pipe)[0].modules()]
    rows = bench.run(pipe, quick=True)
    assert json.loads(json.dumps(rows)) == rows
    cases = {(row["name"].rpartition("/")[2], row["window"][1]) for row in rows}
    assert cases == {(mode, end) for mode in ("reference", "diversity") for end in (0.2, bench.WIDE)}
    for row in rows:
        assert row["name"].startswith("negative_token_merging/") and row["baseline"] == "bare"
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert row["shape"] == "B4, 5 steps" and row["machine"] and isinstance(row["peak_bytes"], int)
    assert [m.__dict__.get("forward") for m in denoiser_of(pipe)[0].modules()] == forwards


def test_the_peer_pushes_and_leaves_no_trace():
    pipe = build("sd15")
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))

    def run(images):
        noise = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "latent"}
        return pipe("a robot", num_images_per_prompt=images, generator=noise, **options).images

    bare = run(3)
    with bench.released(pipe, 1.0, None)() as images:
        assert images == bench.BATCH
        pushed = run(3)
    with bench.released(pipe, 1.0, picture)() as images:
        assert images == bench.BATCH + 1
        run(3)
    torch.testing.assert_close(pushed[0], bare[0])  # image 0 is what the others are pushed from
    assert not torch.allclose(pushed[1:], bare[1:], atol=1e-4)
    assert torch.equal(run(3), bare)


def test_wrong_answers_have_no_speed(monkeypatch):
    monkeypatch.setattr(bench, "merge_tokens", lambda x, *_: (x, None))
    with pytest.raises(TokenMergingError, match="off the naive formula"):
        bench.run(build("sd15"), quick=True)
