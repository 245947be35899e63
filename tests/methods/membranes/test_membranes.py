"""Membranes against explicit float64 loops: packing, gating, folding, files, gates, fingerprints."""

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from semiperm.kernels.gated_low_rank import gated_low_rank
from semiperm.methods.errors import MembraneError, SemipermError
from semiperm.methods.membranes.base_model import base_model_distance, base_model_hash, check_base_model
from semiperm.methods.membranes.file import load_membranes, save_membranes
from semiperm.methods.membranes.gates import always, facilitated_transport, official_gamma, probe_gate
from semiperm.methods.membranes.packing import fold, pack
from semiperm.methods.membranes.types import GateProbe, LowRank, Membrane, Membranes
from semiperm.methods.membranes.weight_edit import membrane_from_weights

KEYS = ("lora_unet_down_blocks_0_attn2_to_k", "lora_unet_mid_block_attn2_to_v")
SIZES = {KEYS[0]: (7, 13), KEYS[1]: (11, 13)}  # out, in
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # eps of the dtype times sums of ~13


def membrane(concept, rank=1, alpha=None, seed=0, dtype=torch.float32, keys=KEYS, conv=False, **fields):
    generator = torch.Generator().manual_seed(seed)
    tail = (1, 1) if conv else ()
    modules = {}
    for key in keys:
        out, size = SIZES[key]
        down = torch.randn(rank, size, *tail, generator=generator).to(dtype)
        up = torch.randn(out, rank, *tail, generator=generator).to(dtype)
        modules[key] = LowRank(down, up, float(rank if alpha is None else alpha))
    return Membrane(concept, modules, **fields)


def oracle(membranes, key, x, gamma):
    """sum_k gamma_bk scale_k up_k (down_k x_bn), one number at a time in float64."""
    out = torch.zeros(*x.shape[:-1], SIZES[key][0], dtype=torch.float64)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            for k, m in enumerate(membranes):
                if key not in m.modules:
                    continue
                pair = m.modules[key]
                for r in range(pair.rank):
                    response = sum(pair.down.flatten(1)[r, i].double() * x[b, n, i].double() for i in range(x.shape[2]))
                    for o in range(pair.up.shape[0]):
                        step = pair.alpha / pair.rank * response * pair.up.flatten(1)[o, r].double()
                        out[b, n, o] += gamma[b, k].double() * step
    return out


def delta(x, down, up, gamma_rows):
    """What a packed pair adds."""
    base = x.new_zeros(*x.shape[:-1], up.shape[1])
    return gated_low_rank(base, x, down.to(x.dtype), up.to(x.dtype), gamma_rows.to(x.dtype))


def stack_of_three(dtype=torch.float32):
    return Membranes(
        [
            membrane("robot", 1, seed=1, dtype=dtype),
            membrane("ghost", 3, alpha=1.5, seed=2, dtype=dtype, keys=KEYS[:1]),
            membrane("van gogh", 2, alpha=0.3, seed=3, dtype=dtype),
        ]
    )


# ---- algebra ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("key", KEYS)
def test_packed_gated_sum_equals_the_loop(dtype, key):
    stack, x, gamma = stack_of_three(), torch.randn(3, 5, 13), torch.rand(3, 3)
    down, up, owner = pack(stack, key)
    assert owner.tolist() == ([0, 1, 1, 1, 2, 2] if key == KEYS[0] else [0, 2, 2])
    got = delta(x.to(dtype), down, up, gamma[:, owner])
    expected = oracle(stack, key, x, gamma)
    assert got.dtype == dtype
    assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_gated_sum_takes_any_middle_dimensions_and_non_contiguous_input():
    stack, gamma = stack_of_three(), torch.rand(2, 3)
    down, up, owner = pack(stack, KEYS[0])
    x = torch.randn(13, 4, 3, 2).permute(3, 1, 2, 0)
    got = delta(x, down, up, gamma[:, owner])
    expected = delta(x.reshape(2, 12, 13), down, up, gamma[:, owner]).reshape(2, 4, 3, -1)
    pooled = delta(x[:, 0, 0], down, up, gamma[:, owner])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(pooled, expected[:, 0, 0])


def test_gate_zero_adds_exactly_nothing_to_its_own_sample():
    stack, x, y = stack_of_three(), torch.randn(2, 5, 13), torch.randn(2, 5, 7)
    down, up, owner = pack(stack, KEYS[0])
    gamma = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    out = gated_low_rank(y, x, down, up, gamma[:, owner])
    assert torch.equal(out[0], y[0]) and not torch.equal(out[1], y[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("conv", [False, True])
def test_folded_equals_fused(dtype, conv):
    stack = Membranes([membrane("robot", 2, seed=4, conv=conv), membrane("ghost", 1, 0.7, seed=5, conv=conv)])
    weight = torch.randn(7, 13, *((1, 1) if conv else ())).to(dtype)
    x, gamma = torch.randn(1, 5, 13).to(dtype), torch.tensor([[0.4, 1.0]])
    down, up, owner = pack(stack, KEYS[0])
    folded = fold(weight, down, up, gamma[0, owner])
    assert folded.dtype == dtype and folded.shape == weight.shape
    fused = x @ weight.flatten(1).T + delta(x, down, up, gamma[:, owner])
    assert (x @ folded.flatten(1).T - fused).abs().max() <= 4 * TOLERANCE[dtype] * fused.abs().max()


def test_folding_at_zero_returns_the_bits():
    weight = torch.tensor([[-0.0, 1e-40, 3.0]]).to(torch.bfloat16)
    pair = LowRank(torch.randn(1, 3), torch.randn(1, 1), 1.0)
    down, up, owner = pack([Membrane("robot", {"lora_unet_x": pair})], "lora_unet_x")
    folded = fold(weight, down, up, torch.zeros(2)[owner])
    assert torch.equal(folded.view(torch.int16), weight.view(torch.int16)) and folded is not weight


def test_the_order_of_stacking_is_irrelevant():
    stack, x, gamma = stack_of_three(), torch.randn(2, 5, 13), torch.rand(2, 3)
    results = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        down, up, owner = pack([stack[i] for i in order], KEYS[0])
        results.append(delta(x, down, up, gamma[:, order][:, owner]))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_official_gate_squares_and_crosses_as_the_released_code():
    stack = [membrane("robot", 2, 1.0, seed=6), membrane("ghost", 2, 1.0, seed=7), membrane("cat", 2, 1.0, seed=8)]
    gamma, x = torch.tensor([[0.46, 1.0, 0.2], [0.0, 0.5, 0.0]]), torch.randn(2, 3, 13)
    down, up, owner = pack(stack, KEYS[0], cross_terms=True)
    got = delta(x, down, up, official_gamma(gamma)[:, owner])
    for b in range(2):  # the released code: weighted sums of up and of down, multiplied afterwards
        ups = sum(g.double() * m.modules[KEYS[0]].up.double() for g, m in zip(gamma[b], stack, strict=True))
        downs = sum(g.double() * m.modules[KEYS[0]].down.double() for g, m in zip(gamma[b], stack, strict=True))
        expected = 0.5 * x[b].double() @ (ups @ downs).T
        torch.testing.assert_close(got[b].double(), expected, rtol=1e-4, atol=1e-5)
    alone = pack(stack[:1], KEYS[0], cross_terms=True)
    squared = delta(x[:1], *alone[:2], official_gamma(gamma[:1, :1])[:, alone[2]])
    plain = delta(x[:1], *pack(stack[:1], KEYS[0])[:2], torch.ones(1, 2))
    torch.testing.assert_close(squared, 0.46**2 * plain)


def test_official_gate_knows_its_membrane_when_another_skips_the_module():
    stack = [membrane("a", keys=KEYS[1:]), membrane("b", seed=1), membrane("c", seed=2)]
    assert pack(stack, KEYS[0], cross_terms=True)[2].tolist() == [4, 5, 7, 8]  # i K + j of b and c


def test_packing_errors():
    with pytest.raises(MembraneError, match="none of the 1 membranes wraps 'lora_unet_nowhere'"):
        pack([membrane("robot")], "lora_unet_nowhere")
    with pytest.raises(MembraneError, match="equal ranks"):
        pack([membrane("robot", 1), membrane("ghost", 2)], KEYS[0], cross_terms=True)
    other = Membrane("ghost", {KEYS[0]: LowRank(torch.ones(1, 12), torch.ones(7, 1), 1.0)})
    with pytest.raises(MembraneError, match="different base models"):
        pack([membrane("robot"), other], KEYS[0])


# ---- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 1), r"down \(2, 3\) and up \(4, 1\)"),
        (torch.ones(2, 3, 3, 3), torch.ones(4, 2, 1, 1), "larger convolution kernels"),
        (torch.ones(2, 3), torch.ones(4, 2, 1, 1), "expected"),
        (torch.ones(3), torch.ones(4, 1), "expected"),
        (torch.full((2, 3), math.nan), torch.ones(4, 2), "NaN or Inf"),
        (torch.ones(2, 3), torch.full((4, 2), math.inf), "NaN or Inf"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(4, 2), "floating point"),
    ],
)
def test_wrong_pairs_are_refused(down, up, message):
    with pytest.raises(MembraneError, match=message):
        LowRank(down, up, 1.0)


def test_other_wrong_values_are_refused():
    with pytest.raises(MembraneError, match="NaN or Inf"):
        LowRank(torch.ones(1, 3), torch.ones(4, 1), math.nan)
    with pytest.raises(MembraneError, match="wraps no module"):
        Membrane("robot", {})
    with pytest.raises(MembraneError, match="without a concept name"):
        Membrane("", membrane("robot").modules)
    with pytest.raises(MembraneError, match="low < high"):
        GateProbe(torch.ones(3), 1.0, 1.0)
    with pytest.raises(MembraneError, match="probe weight"):
        GateProbe(torch.ones(3, 1), 0.0, 1.0)


def test_a_stack_is_a_sequence():
    first, second = membrane("robot"), membrane("ghost", keys=KEYS[1:])
    stack = Membranes(second) + Membranes([first])
    assert stack.concepts == ("ghost", "robot") and stack[1] is first and len(stack[:1]) == 1
    assert stack.module_keys == (KEYS[1], KEYS[0]) and isinstance(stack[:1], Membranes)
    assert first.phrases == ("robot",)


# ---- files -----------------------------------------------------------------------------------------------------------


def assert_same(first, second):
    assert first.concepts == second.concepts
    for a, b in zip(first, second, strict=True):
        for name in ("phrases", "surrogate", "method", "base_model", "metadata"):
            assert getattr(a, name) == getattr(b, name)
        assert a.modules.keys() == b.modules.keys()
        for key in a.modules:
            x, y = a.modules[key], b.modules[key]
            assert x.alpha == y.alpha and x.down.dtype == y.down.dtype and x.up.dtype == y.up.dtype
            assert torch.equal(x.down, y.down) and torch.equal(x.up, y.up)
        assert (a.probe is None) == (b.probe is None)
        if a.probe is not None:
            assert a.probe.meaning == b.probe.meaning
            assert (a.probe.low, a.probe.high, a.probe.separation) == (b.probe.low, b.probe.high, b.probe.separation)
            assert a.probe.weight.dtype == b.probe.weight.dtype and torch.equal(a.probe.weight, b.probe.weight)


@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCE], ids=str)
@pytest.mark.parametrize("conv", [False, True])
def test_one_membrane_round_trips_bit_for_bit(tmp_path, dtype, conv):
    probe = GateProbe(torch.randn(9).to(dtype), 0.1, 1 / 3, separation=0.7, meaning=0.4)
    given = membrane(
        "van gogh, the painter", 3, 0.1, dtype=dtype, conv=conv, phrases=("van gogh, the painter", "vincent \u2603"),
        surrogate="painting", method="closed_form/uce", base_model="0123456789abcdef", probe=probe, metadata={"k": "v"},
    )  # fmt: skip
    path = save_membranes(given, tmp_path / "new" / "m.safetensors")
    assert_same(load_membranes(path), Membranes(given))
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("alphas", [(1, 3, 2), (0.1, 0.3, 0.2), (1, 1.5, 8)], ids=["ones", "shared", "powers_of_two"])
def test_packed_concepts_round_trip_and_read_as_one_lora(tmp_path, alphas):
    ranks, dtypes = (1, 3, 2), (torch.float32, torch.float16, torch.bfloat16)
    names, keys = ("robot", "ghost", "robot"), (KEYS, KEYS[1:], KEYS[:1])
    given = Membranes(
        membrane(n, r, a, seed=r, dtype=d, keys=k, metadata={"i": n})
        for n, r, a, d, k in zip(names, ranks, alphas, dtypes, keys, strict=True)
    )
    path = save_membranes(given, tmp_path / "three.safetensors")
    assert_same(load_membranes(path), given)
    plain = load_file(path)  # what a LoRA loader does with it: scale = alpha / rank, no gates
    for key in KEYS:
        down, up, alpha = (plain[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        x = torch.randn(1, 2, 13)
        got = alpha / down.shape[0] * x @ down.T @ up.T
        torch.testing.assert_close(got.double(), oracle(given, key, x, torch.ones(1, 3)), rtol=1e-4, atol=1e-4)


def test_scales_that_cannot_fold_exactly_are_refused_and_nothing_is_written(tmp_path):
    path = save_membranes(membrane("robot"), tmp_path / "m.safetensors")
    before = path.read_bytes()
    with pytest.raises(MembraneError, match="without losing bits"):
        save_membranes([membrane("robot", 8, 0.3, seed=1), membrane("ghost", 8, 0.7, seed=2)], path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path, monkeypatch):
    path = save_membranes(membrane("robot"), tmp_path / "m.safetensors")
    before = path.read_bytes()

    def broken(tensors, temporary, metadata):
        Path(temporary).write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_membranes(membrane("ghost"), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("metadata", [None, {"prompts": "Mickey,Mouse ears", "rank": "1", "alpha": "1.0"}])
def test_published_spm_files_load(tmp_path, rank, metadata):
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {
        f"{key}.lora_down.weight": torch.randn(rank, 6, 1, 1),
        f"{key}.lora_up.weight": torch.randn(8, rank, 1, 1),
        f"{key}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "mickey_last.safetensors", metadata=metadata)
    (loaded,) = load_membranes(str(tmp_path / "mickey_last.safetensors"))
    assert loaded.method == ("spm" if metadata else "lora") and loaded.modules[key].scale == 1 / rank
    assert loaded.metadata == {} and loaded.named == bool(metadata)
    assert loaded.phrases == (("Mickey", "Mouse ears") if metadata else ())  # a file's name is for people alone
    assert torch.equal(loaded.modules[key].up, tensors[f"{key}.lora_up.weight"])
    again = save_membranes(loaded, tmp_path / "again.safetensors")
    assert_same(load_membranes(again), Membranes(loaded))


def test_kohya_lora_without_alpha_loads_with_scale_one(tmp_path):
    tensors = {"lora_unet_x.lora_down.weight": torch.randn(4, 6), "lora_unet_x.lora_up.weight": torch.randn(8, 4)}
    save_file(tensors, tmp_path / "style.safetensors", metadata={"ss_network_dim": "4"})
    (loaded,) = load_membranes([tmp_path / "style.safetensors"])
    assert loaded.method == "lora" and loaded.concept == "style" and loaded.modules["lora_unet_x"].scale == 1
    assert loaded.metadata == {"ss_network_dim": "4"}


def test_bad_files_are_named_and_explained(tmp_path):
    def written(name, tensors, metadata=None):
        save_file(tensors, tmp_path / name, metadata=metadata)
        return tmp_path / name

    down, up = torch.ones(1, 3), torch.ones(4, 1)
    good = {"lora_unet_x.lora_down.weight": down, "lora_unet_x.lora_up.weight": up}
    for name in ("a.pt", "a.bin", "a.ckpt", "disguised.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"x": 1}))
        with pytest.raises(SemipermError, match=f"{name}.*pickle"):
            load_membranes(tmp_path / name)
    torch.save({"x": up}, tmp_path / "zip.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"hello, this is no header at all")
    (tmp_path / "cut.safetensors").write_bytes(written("whole.safetensors", good).read_bytes()[:-3])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    newer = {"format_version": "99", "semiperm": "{}"}
    nan = {**good, "lora_unet_x.lora_up.weight": up * math.nan}
    ranks = json.dumps({"modules": ["lora_unet_x"], "membranes": [{"pairs": [[2, 2.0, "float32", "float32", None]]}]})
    cases = {
        "absent.safetensors": "no file at",
        "zip.safetensors": "pickle",
        "text.safetensors": "not a readable safetensors",
        "cut.safetensors": "not a readable safetensors",
        "empty.safetensors": "not a readable safetensors",
        written("nan.safetensors", nan).name: "lora_unet_x: .*NaN",
        written("half.safetensors", {"lora_unet_x.lora_down.weight": down}).name: "only its down part",
        written(
            "peft.safetensors", {"unet.x.lora_A.weight": down, "unet.x.lora_B.weight": up}
        ).name: "import_membranes",
        written("loha.safetensors", {**good, "lora_unet_x.dora_scale": up.clone()}).name: "DoRA",
        written("shape.safetensors", {**good, "lora_unet_x.lora_up.weight": torch.ones(4, 2)}).name: "down .1, 3.",
        written("newer.safetensors", good, newer).name: "update semiperm",
        written("json.safetensors", good, {"format_version": "1", "semiperm": "{"}).name: "metadata is damaged",
        written("ranks.safetensors", good, {"format_version": "1", "semiperm": ranks}).name: "metadata says .2.",
    }
    for name, message in cases.items():
        with pytest.raises(SemipermError, match=message) as caught:
            load_membranes(tmp_path / name)
        assert name in str(caught.value)


def test_saving_nothing_or_under_another_suffix_is_refused(tmp_path):
    with pytest.raises(MembraneError, match="no membranes"):
        save_membranes([], tmp_path / "m.safetensors")
    with pytest.raises(MembraneError, match="ending in .safetensors"):
        save_membranes(membrane("robot"), tmp_path / "m.pt")


# ---- gates -----------------------------------------------------------------------------------------------------------


def test_facilitated_transport_by_hand():
    prompts = torch.tensor([[[3.0, 0.0], [4.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [0.0, 0.0]]])
    phrases = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
    # cosines 3/5 and 3/(5 sqrt 2); 0 and 1/sqrt 2; -1 and -1/sqrt 2.  overlaps 1/2, 0; 0, 0; 0, 0
    ids, concept_ids = [[5, 6, 6], [9], []], [{6, 7}, {8}]
    got = facilitated_transport(prompts, phrases, ids, concept_ids)
    torch.testing.assert_close(got, torch.tensor([0.6, 2**-0.5, 0.0]))
    certain = facilitated_transport(prompts[1:2], phrases[:1], [{6, 7, 9}], [{6, 7}])  # orthogonal, yet named in full
    assert certain.tolist() == [1.0]
    assert facilitated_transport(prompts[1:2], phrases[:1], [{6}], [set()]).tolist() == [0.0]


def test_facilitated_transport_agrees_with_the_loop_and_with_itself_one_by_one():
    prompts, phrases = torch.randn(4, 5, 3), torch.randn(3, 5, 3)
    ids, concept_ids = [{1, 2}, {3}, {4, 5, 1}, set()], [{1, 9}, {4, 5}, {7}]
    expected = []
    for p, t in zip(prompts.double(), ids, strict=True):
        gates = []
        for c, s in zip(phrases.double(), concept_ids, strict=True):
            cosine = (p.flatten() @ c.flatten() / (p.norm() * c.norm())).item()
            gates.append(max(cosine, len(s & t) / len(s)))
        expected.append(max(gates))
    got = facilitated_transport(prompts, phrases, ids, concept_ids)
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    single = torch.cat(
        [facilitated_transport(prompts[i : i + 1], phrases, ids[i : i + 1], concept_ids) for i in range(4)]
    )
    torch.testing.assert_close(got, single)


def test_probe_gate_by_hand():
    probe = GateProbe(torch.tensor([1.0, -1.0]), low=1.0, high=3.0)
    hidden = torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[0.5, 0.0], [9.0, 9.0]], [[4.0, 0.0], [-8.0, 0.0]]])
    assert probe_gate(hidden, probe).tolist() == [0.5, 0.0, 1.0]
    assert always(3).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(MembraneError, match="probe of width 2"):
        probe_gate(torch.zeros(1, 2, 3), probe)
    with pytest.raises(MembraneError, match="same length"):
        facilitated_transport(torch.zeros(1, 2, 3), torch.zeros(1, 4, 3), [set()], [set()])


# ---- base models -----------------------------------------------------------------------------------------------------


def weights(seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {key: scale * torch.randn(*SIZES[key], generator=generator) for key in KEYS}


def test_fingerprint_sees_through_dtypes_and_fine_tuning_but_not_through_models():
    base, near = weights(), weights(9, 0.05)
    other = [base_model_distance(base_model_hash(base), base_model_hash(weights(seed))) for seed in range(1, 30)]
    assert min(other) > 12 and 28 < sum(other) / len(other) < 36
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert (
            base_model_distance(base_model_hash(base), base_model_hash({k: w.to(dtype) for k, w in base.items()})) <= 2
        )
    tuned = {key: base[key] + near[key] for key in KEYS}
    assert base_model_distance(base_model_hash(base), base_model_hash(tuned)) <= 8
    assert base_model_hash(dict(reversed(base.items()))) == base_model_hash(base) and len(base_model_hash(base)) == 16


def test_a_membrane_for_another_model_is_refused():
    made = membrane("robot", base_model=base_model_hash(weights()))
    check_base_model(made, {**weights(), "lora_unet_more": torch.ones(2, 2)})
    check_base_model(membrane("robot"), weights(5))  # says nothing about its base model
    with pytest.raises(MembraneError, match=r"64 bits differ.*semiperm erase"):
        check_base_model(made, weights(5))
    with pytest.raises(MembraneError, match="no such module"):
        check_base_model(made, {KEYS[0]: weights()[KEYS[0]]})
    with pytest.raises(MembraneError, match=r"shape \(7, 12\).*another base model"):
        check_base_model(made, {**weights(), KEYS[0]: torch.ones(7, 12)})


@pytest.mark.parametrize("conv", [False, True])
def test_a_weight_edit_becomes_a_membrane(conv):
    def shaped(w):
        return w[..., None, None] if conv else w

    base = weights()
    after = {KEYS[0]: base[KEYS[0]] + torch.randn(7, 2) @ torch.randn(2, 13)}
    made = membrane_from_weights(
        {k: shaped(w) for k, w in base.items()}, {k: shaped(w) for k, w in after.items()}, "robot", method="uce"
    )
    pair = made.modules[KEYS[0]]
    assert made.modules.keys() == after.keys() and pair.is_conv == conv and made.method == "uce"
    assert pair.rank in (2, 3)  # the float32 sum leaves rounding of about the tolerance
    down, up, _ = pack([made], KEYS[0])
    torch.testing.assert_close(
        fold(base[KEYS[0]], down, up, torch.ones(pair.rank)), after[KEYS[0]], rtol=1e-5, atol=1e-5
    )
    assert membrane_from_weights(base, after, "robot", rank=1).modules[KEYS[0]].rank == 1
    with pytest.raises(MembraneError, match="equal the base model's"):
        membrane_from_weights(base, base, "robot")
    with pytest.raises(MembraneError, match="wrong base model"):
        membrane_from_weights(base, {"lora_unet_y": torch.ones(2, 2)}, "robot")
