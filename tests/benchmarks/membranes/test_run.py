"""The overhead benchmark reports what it promises, and refuses to time wrong answers."""

import json

import pytest
from semiperm.benchmarks.membranes import run as bench
from semiperm.methods.errors import MembraneError
from semiperm.pipelines.family import denoiser_of
from tiny_models import build


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # one adapter a membrane is what is measured
def test_rows():
    pytest.importorskip("peft")
    pipe = build("sd15")
    rows = bench.run(pipe, quick=True)
    assert json.loads(json.dumps(rows)) == rows
    names = {"membranes/cached", "membranes/folded", "membranes/fused", "peft/adapters"}
    assert {(row["name"], row["k"]) for row in rows} == {(name, k) for name in names for k in (1, 10)}
    for row in rows:
        assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert row["machine"] and {"torch", "diffusers", "peft"} <= row["versions"].keys()
    assert not hasattr(denoiser_of(pipe)[0], "peft_config")


def test_wrong_answers_have_no_speed(monkeypatch):
    pipe = build("sd15")
    monkeypatch.setattr(bench, "_with_peft", lambda pipe, stack: build("sd15", seed=1).unet)
    with pytest.raises(MembraneError, match="peft/adapters differs"):
        bench.run(pipe, quick=True)
