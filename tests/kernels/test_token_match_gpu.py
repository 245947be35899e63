"""The torch path for GPUs without our kernels: right, and nothing in it waits for the device (the meta device)."""

import pytest
import torch
from semiperm.kernels import token_match_gpu
from semiperm.kernels import token_match_merge as module
from semiperm.kernels.token_match_merge import best_match, token_match_merge
from torch.utils._python_dispatch import TorchDispatchMode

CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-3}  # of a cosine: products are rounded


@pytest.fixture(autouse=True)
def tiles(monkeypatch, reference_path):
    """On a CPU, as on a GPU without Triton; several tiles."""
    monkeypatch.setattr(module, "_on_gpu", lambda x: True)
    monkeypatch.setattr(token_match_gpu, "TILE", 700)
    for name in ("best_match_reference", "token_match_merge_reference", "_launch"):
        monkeypatch.setattr(module, name, None)


def sample(dtype, rows=3, references=2):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(references, 53, 24, generator=generator)
    pick = torch.randint(53 * references, (rows, 37), generator=generator)
    noise = torch.rand(rows, 37, 1, generator=generator) * torch.randn(rows, 37, 24, generator=generator)
    return (reference.flatten(0, 1)[pick] * 2 + 5 * noise).to(dtype), reference.to(dtype)


@pytest.mark.parametrize("host", [False, True], ids=["device knows", "host knows"])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
def test_winners_and_pushes(dtype, host):
    x, reference = sample(dtype)
    pairs = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    gate, mask = torch.tensor([1.0, 0.5, 0.0]), torch.rand(2, 53, generator=torch.Generator().manual_seed(1)) < 0.7
    strength = torch.tensor([[0.9, 0.9], [2.0, -0.5], [1.0, 1.0]])
    seen = ((0,), (0, 1), ()) if host else None
    merged, score, index = token_match_merge(
        x, reference, strength, 0.6, pairs=pairs, reference_mask=mask, gate=gate, seen=seen
    )
    cosine = torch.nn.functional.cosine_similarity(x.double()[:, :, None], reference.double().flatten(0, 1), dim=-1)
    cosine[~(pairs[:, :, None] & mask).flatten(1)[:, None].expand_as(cosine)] = -torch.inf
    top = cosine.amax(-1)
    assert (index[2] == -1).all() and (score[2] == -torch.inf).all() and torch.equal(merged[2], x[2])
    won = cosine.gather(-1, index.clamp_min(0)[..., None])[..., 0]
    assert (top - won)[:2].max() <= CLOSE[dtype] and (score - won)[:2].abs().max() <= CLOSE[dtype]
    amount = (strength.gather(1, index.clamp_min(0) // 53) * gate[:, None])[..., None]
    wanted = x.float() + amount * (x.float() - reference.flatten(0, 1)[index.clamp_min(0)].float())
    torch.testing.assert_close(merged, torch.where((score > 0.6)[..., None], wanted.to(dtype), x))


def test_ties_go_to_the_lowest_and_what_is_no_number_to_nobody():
    x, reference = (t.round() for t in sample(torch.float32))
    assert (best_match(x, reference.repeat(1, 3, 1))[1] % 159 < 53).all()
    x[0, 3, 1], reference[1, 5, 2] = torch.nan, torch.inf
    score, index = best_match(x, reference)
    assert index[0, 3] == -1 and score[0, 3] == -torch.inf and not (index == 53 + 5).any()
    assert score[0, :3].isfinite().all() and score[1:].isfinite().all()


class Copies(TorchDispatchMode):
    """Counts what makes the host wait, or cannot be captured into a CUDA graph: numbers that come from a list."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        devices = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor) and t.ndim}
        if "lift_fresh" in str(function) or len(devices) > 1:
            self.found.append(str(function))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["reference", "diversity", "video", "official"])
def test_a_layer_never_waits_for_the_device(monkeypatch, mode, dtype):
    """On the meta device every read of a number raises."""
    from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
    from semiperm.methods.token_merging.merging import diversity_rows, knobs, merge_tokens, reference_rows

    monkeypatch.setenv("SEMIPERM_KERNELS", "auto")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know this device
    monkeypatch.setattr(token_match_gpu, "TILE", 2**24)
    picture = torch.rand(3, 8, 8)
    config = NegativeTokenMergingConfig(
        None if mode == "diversity" else [picture, picture],
        strength=0.9 if mode == "diversity" else (0.9, 0.0),
        compat="official" if mode == "official" else None,
    )
    x = torch.empty(6, 24, 16, device="meta", dtype=dtype)
    if mode == "diversity":
        rows, reference = diversity_rows([-1, -1, -1, 0, 0, 0], device="meta"), x
    else:
        rows, reference = reference_rows([-1, -1, 0, 0], 2, "meta").padded(2), x[4:]
    strength, threshold = knobs(config, len(reference), "meta")
    mask = torch.ones(2, 24, dtype=torch.bool, device="meta") if mode != "diversity" else None

    def layer():
        with Copies() as copies:
            given = {"strength": strength, "threshold": threshold, "frames": 3 if mode == "video" else 1}
            return copies, merge_tokens(x, reference, rows, config, mask, **given)

    layer()  # what rows of frames are is made once
    copies, (merged, pushed) = layer()
    assert copies.found == [] and merged.device.type == "meta"
    assert merged.shape == x.shape and merged.dtype == dtype and pushed.shape == (6, 24)
