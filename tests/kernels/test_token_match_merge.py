"""Token matching and merging against a float64 oracle, on both paths, with poisoned outputs and asserted routing."""

import pytest
import torch
from semiperm.kernels import dispatch
from semiperm.kernels import token_match_merge as module
from semiperm.kernels.token_match_merge import best_match, token_match_merge
from torch._dynamo.testing import CompileCounterWithBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = ["B2-N37-M53-R1-C40", "B3-N70-M37-R2-C24", "B1-N130-M150-R3-C72", "B1-N1-M1-R1-C3"]
TIE = 2e-6


@pytest.fixture
def path(each_path, monkeypatch):
    """Force a path; afterwards, assert that it ran and that the other one did not."""
    ran = set()

    def watch(name, label):
        original = getattr(module, name)

        def watched(*args, **kwargs):
            ran.add(label)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch("_launch", "triton")
    watch("best_match_reference", "reference")
    watch("token_match_merge_reference", "reference")
    yield each_path
    assert ran == {each_path}


def sample(shape: str, dtype=torch.float32, seed=0):
    """x (B, N, C) whose tokens resemble some of the reference's (R, M, C) to different degrees."""
    b, n, m, r, c = (int(part[1:]) for part in shape.split("-"))
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(r, m, c, generator=generator)
    pick = torch.randint(r * m, (b, n), generator=generator)
    noise = torch.rand(b, n, 1, generator=generator) * torch.randn(b, n, c, generator=generator)
    x = reference.reshape(-1, c)[pick] * 2 + 5 * noise
    return x.to(DEVICE, dtype), reference.to(DEVICE, dtype)


def cosines(x, reference, pairs=None, mask=None, gate=None):
    """(B, N, R * M) in float64; -inf where matching is not allowed."""
    x, reference = x.double(), reference.double()
    out = torch.einsum("bnc,rmc->bnrm", x, reference)
    norms = x.norm(dim=-1)[:, :, None, None] * reference.norm(dim=-1)
    out = torch.where(norms > 0, out / norms.clamp_min(1e-300), 0.0)
    if pairs is not None:
        out = out.masked_fill(~pairs[:, None, :, None], -torch.inf)
    if mask is not None:
        out = out.masked_fill(~mask[None, None], -torch.inf)
    if gate is not None:
        out = out.masked_fill((gate == 0)[:, None, None, None], -torch.inf)
    return out.flatten(2)


def check_match(score, index, expected):
    """The winners are the oracle's, up to ties."""
    top = expected.amax(-1)
    assert score.dtype == torch.float32 and index.dtype == torch.int64
    torch.testing.assert_close(score.double(), top, atol=TIE, rtol=0)
    assert (index[top == -torch.inf] == -1).all()
    won = expected.gather(-1, index.clamp_min(0)[..., None]).squeeze(-1)
    assert (top - won)[top > -torch.inf].le(TIE).all()


def check_merge(result, x, reference, strength, threshold, **options):
    merged, score, index = result
    expected = cosines(x, reference, **options)
    check_match(score, index, expected)
    gate = options.get("gate")
    amount = torch.as_tensor(strength, device=x.device).double().expand(len(x)) * (1 if gate is None else gate.double())
    amount = amount[:, None, None].double()
    other = reference.double().flatten(0, 1)[index.clamp_min(0)]
    hit = (score > threshold)[..., None] & (amount != 0)
    wanted = torch.where(hit, x.double() + amount * (x.double() - other), x.double())
    assert merged.dtype == x.dtype and merged.shape == x.shape and merged.is_contiguous()
    torch.testing.assert_close(merged, wanted.to(x.dtype))
    same_bits(merged[~hit.expand_as(x)], x[~hit.expand_as(x)])


def same_bits(a, b):
    bits = {4: torch.int32, 2: torch.int16}[a.element_size()]
    assert torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_oracle(path, poisoned, shape, dtype):
    x, reference = sample(shape, dtype)
    check_match(*best_match(x, reference), cosines(x, reference))
    result = token_match_merge(x, reference, 0.9, 0.7)
    check_merge(result, x, reference, 0.9, 0.7)
    if x.shape[1] > 1:
        assert 0.1 < (result[1] > 0.7).float().mean() < 0.95, "the sample must have both kinds of tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options(path, poisoned, dtype):
    x, reference = sample("B4-N70-M53-R3-C40", dtype)
    generator = torch.Generator().manual_seed(1)
    options = {
        "pairs": torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]], device=DEVICE).bool(),
        "mask": (torch.rand(3, 53, generator=generator) < 0.5).to(DEVICE),
        "gate": torch.tensor([1.0, 0.5, 0.0, 1.0], device=DEVICE),
    }
    options["mask"][1] = False  # row 1 sees that reference alone
    strength = torch.tensor([0.9, 0.5, 0.7, -0.6], device=DEVICE)
    for name, keywords in [("all", options), *((name, {name: options[name]}) for name in options)]:
        given = {{"mask": "reference_mask"}.get(key, key): value for key, value in keywords.items()}
        check_merge(token_match_merge(x, reference, strength, 0.6, **given), x, reference, strength, 0.6, **keywords)
        given = {{"mask": "key_mask"}.get(key, key): value for key, value in keywords.items()}
        check_match(*best_match(x, reference, **given), cosines(x, reference, **keywords))
        assert name != "all" or (cosines(x, reference, **keywords)[1:] == -torch.inf).all()


@pytest.mark.parametrize("cores", [1, 7, 64])
def test_keys_are_cut_for_many_cores(triton_path, poisoned, monkeypatch, cores):
    monkeypatch.setattr(module, "_cores", lambda device: cores)
    x, reference = sample("B2-N37-M150-R3-C40")
    pairs = torch.tensor([[1, 0, 1], [0, 1, 0]], device=DEVICE).bool()
    options = {"pairs": pairs, "gate": torch.tensor([1.0, 0.5], device=DEVICE)}
    check_merge(token_match_merge(x, reference, 0.9, 0.7, **options), x, reference, 0.9, 0.7, **options)
    twice = reference.round()[:, torch.arange(150, device=DEVICE) % 75]
    index = best_match(x.round(), twice)[1]
    assert (index % 150 < 75).all(), "on ties the lowest, also across splits"


def test_how_keys_are_cut():
    """Flux at 1024 pixels, one picture on an H100: 32 programs become 128 of 132; more rows need no cut."""
    assert module._splits(32, 32, 132) == 4 and module._splits(16, 8, 132) == 8
    assert module._splits(132, 32, 132) == 1 and module._splits(1000, 32, 132) <= 2
    assert module._splits(1, 3, 132) == 3 and module._splits(5, 1, 132) == 1


def test_each_reference_has_its_own_strength_and_the_host_may_know_who_sees_whom(path, poisoned):
    x, reference = sample("B3-N37-M53-R2-C40")
    strength = torch.tensor([[0.9, -0.5], [2.0, 0.0], [1.0, 1.0]], device=DEVICE)
    pairs = torch.tensor([[1, 1], [1, 1], [0, 1]], device=DEVICE).bool()
    gate = torch.tensor([1.0, 1.0, 0.0], device=DEVICE)
    given = {"pairs": pairs, "gate": gate}
    merged, score, index = token_match_merge(x, reference, strength, 0.3, **given)
    known = token_match_merge(x, reference, strength, 0.3, **given, seen=((0, 1), (0, 1), ()))
    assert all(torch.equal(a, b) for a, b in zip((merged, score, index), known, strict=True))
    check_match(score, index, cosines(x, reference, **given))
    amount = strength.gather(1, index.clamp_min(0) // 53)[..., None]
    wanted = x + amount * (x - reference.flatten(0, 1)[index.clamp_min(0)])
    hit = (score > 0.3)[..., None] & (amount != 0)
    torch.testing.assert_close(merged, torch.where(hit, wanted, x))
    assert 0 < ((score > 0.3) & (index // 53 == 1))[1].sum(), "some match the reference that keeps"
    same_bits(merged[~hit.expand_as(x)], x[~hit.expand_as(x)])


def test_minus_1_is_every_token_also_the_opposite_one(path):
    x, reference = sample("B1-N37-M1-R1-C40")
    x[0, 3] = -2 * reference[0, 0]
    for threshold in (-1.0, torch.tensor(-1.0, device=DEVICE)):
        merged, score, _ = token_match_merge(x, reference, 1.0, threshold)
        assert score[0, 3] <= -1 + TIE
        torch.testing.assert_close(merged[0], 2 * x[0] - reference[0])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # in Triton's interpreter
def test_what_is_no_number_matches_nothing_and_is_matched_by_nothing(path):
    x, reference = sample("B2-N37-M53-R1-C40")
    clean = token_match_merge(x, reference, 0.9, 0.3, reference_mask=torch.arange(53, device=DEVICE)[None] != 7)
    reference[0, 7, 3] = torch.nan
    x[1, 5, 0] = torch.inf
    merged, score, index = token_match_merge(x, reference, 0.9, 0.3)
    others = torch.ones(2, 37, dtype=torch.bool)
    others[1, 5] = False
    for mine, expected in zip((merged, score, index), clean, strict=True):
        torch.testing.assert_close(mine[others], expected[others])
    assert index[1, 5] == -1 and score[1, 5] == -torch.inf
    same_bits(merged[1, 5], x[1, 5])


def test_autocast_changes_nothing(path):
    x, reference = sample("B2-N37-M53-R1-C40")
    expected = token_match_merge(x, reference, 0.9, 0.3)
    with torch.autocast(DEVICE, torch.bfloat16):
        mixed = token_match_merge(x, reference, 0.9, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))


def test_the_configuration_for_long_inputs(triton_path, monkeypatch):
    monkeypatch.setattr(module, "SHORT", 0)
    x, reference = sample("B1-N130-M150-R1-C72", torch.bfloat16)
    check_merge(token_match_merge(x, reference, 0.9, 0.7), x, reference, 0.9, 0.7)


def test_views(path, poisoned):
    whole, _ = sample("B5-N37-M1-R1-C40")
    whole[3:] = whole[:2].flip(1) + 0.3 * torch.randn_like(whole[:2])
    check_merge(token_match_merge(whole[:3], whole[3:], 0.9, 0.5), whole[:3], whole[3:], 0.9, 0.5)
    x, reference = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (whole[:3], whole[3:]))
    check_merge(token_match_merge(x, reference, 0.9, 0.5), x, reference, 0.9, 0.5)
    x, reference = whole[:3, ::2, 1::2], whole[3:, 1:, ::2]
    check_merge(token_match_merge(x, reference, 0.9, 0.5), x, reference, 0.9, 0.5)
    x = whole[:1].expand(3, -1, -1)
    check_merge(token_match_merge(x, whole[3:], 0.9, 0.5), x, whole[3:], 0.9, 0.5)


def test_every_image_against_all_others(path):
    x = sample("B4-N37-M1-R1-C40")[0]
    x[1:] += x[:1].flip(1)
    others = ~torch.eye(4, dtype=torch.bool, device=DEVICE)
    result = token_match_merge(x, x, 0.9, 0.3, pairs=others)
    check_merge(result, x, x, 0.9, 0.3, pairs=others)
    assert (result[2] // 37 != torch.arange(4, device=DEVICE)[:, None]).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # 0 * inf, in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neutral_values_keep_the_bits(path, dtype):
    x, reference = sample("B2-N37-M53-R1-C40", dtype)
    x[0, 0, 0], x[0, 1] = -0.0, reference[0, 5]
    reference[0, 7] = torch.inf  # 0 * inf would be NaN
    never = torch.zeros(2, 1, dtype=torch.bool, device=DEVICE)
    for strength, threshold, options in (
        (0.0, -1.0, {}),
        (0.9, 1.01, {}),
        (0.9, -1.0, {"gate": torch.zeros(2, device=DEVICE)}),
        (0.9, -1.0, {"gate": torch.zeros(2, dtype=torch.bool, device=DEVICE)}),
        (0.9, -1.0, {"pairs": never}),
        (0.9, -1.0, {"reference_mask": never[:1].expand(1, 53)}),
    ):
        merged, score, index = token_match_merge(x, reference, strength, threshold, **options)
        same_bits(merged, x)
        if options:
            assert (score == -torch.inf).all() and (index == -1).all()


def test_negative_strength_pulls_towards_the_reference(path):
    x, reference = sample("B1-N37-M53-R1-C40")
    merged, _, index = token_match_merge(x, reference, -1.0, -1.0)
    torch.testing.assert_close(merged, reference.flatten(0, 1)[index])


def test_lowest_index_on_ties_and_zero_vectors(path):
    x, reference = (t.round() for t in sample("B2-N37-M53-R1-C40"))  # exact sums: equal keys have equal scores
    reference = reference.repeat(2, 3, 1)
    score, index = best_match(x, reference)
    assert (index < 53).all()
    assert (best_match(x, reference, pairs=torch.tensor([[0, 1]] * 2, device=DEVICE).bool())[1] // 159 == 1).all()
    score, index = best_match(torch.zeros_like(x), reference)
    assert (score == 0).all() and (index == 0).all()
    assert (best_match(x, torch.zeros_like(reference))[0] == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 3e3])
def test_the_norm_does_not_matter(path, scale):
    x, reference = sample("B2-N37-M53-R1-C40", torch.float16)
    check_match(*best_match(x, reference * scale), cosines(x, reference * scale))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiles_whole_and_once(path, backend):
    counter = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def step(x, reference, strength, gate, pairs):
        merged, score, _ = token_match_merge(x * 1, reference, strength, 0.6, gate=gate, pairs=pairs)
        return merged + 0, score, best_match(x, reference, gate=gate)[1]

    x, reference = sample("B2-N37-M53-R2-C40")
    for gates in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0]):
        strength, gate = torch.tensor([0.9, -0.5], device=DEVICE), torch.tensor(gates, device=DEVICE)
        pairs = torch.tensor([[1, 0], [int(gates[0]), 1]], device=DEVICE).bool()
        merged, score, index = step(x, reference, strength, gate, pairs)
        expected = token_match_merge(x, reference, strength, 0.6, gate=gate, pairs=pairs)
        assert torch.equal(merged, expected[0]) and torch.equal(score, expected[1])
        assert torch.equal(index, best_match(x, reference, gate=gate)[1])
    assert counter.frame_count == 1


def test_gradients_flow_through_the_merge(path):
    x, reference = sample("B2-N37-M53-R1-C40")
    strength = torch.tensor([0.9, -0.5], device=DEVICE, requires_grad=True)
    x.requires_grad_(), reference.requires_grad_()
    merged, score, index = token_match_merge(x, reference, strength, 0.7)
    plain = token_match_merge(x.detach(), reference.detach(), strength.detach(), 0.7)
    torch.testing.assert_close(merged, plain[0])
    assert torch.equal(score, plain[1]) and not score.requires_grad
    merged.sum().backward()
    hit = (score > 0.7)[..., None].float()
    torch.testing.assert_close(x.grad, (1 + hit * strength[:, None, None]).expand_as(x).detach())
    weight = (hit * strength[:, None, None]).squeeze(-1).detach()
    wanted = torch.zeros(53, device=DEVICE).index_add_(0, index.flatten(), -weight.flatten())
    torch.testing.assert_close(reference.grad[0], wanted[:, None].expand(-1, 40))
    torch.testing.assert_close(
        strength.grad, (hit * (x - reference[0][index])).sum((1, 2)).detach(), rtol=1e-4, atol=1e-4
    )


def test_forcing_triton_where_it_cannot_run(monkeypatch):
    x, reference = (t.cpu() for t in sample("B2-N37-M53-R1-C40"))
    monkeypatch.setenv("SEMIPERM_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(dispatch.KernelError, match="SEMIPERM_KERNELS=triton"):
        token_match_merge(x, reference, 0.9, 0.7)
    with pytest.raises(dispatch.KernelError, match="SEMIPERM_KERNELS=triton"):
        best_match(x, reference)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reference": torch.zeros(1, 5, 7)}, r"\(2, 4, 8\) and \(1, 5, 7\)"),
        ({"reference": torch.zeros(5, 8)}, r"expected \(B, N, C\) and \(R, M, C\)"),
        ({"reference": torch.zeros(1, 0, 8)}, "none of them 0"),
        ({"reference": torch.zeros(1, 5, 8).half()}, "torch.float16"),
        ({"pairs": torch.ones(1, 2).bool()}, r"pairs is \(1, 2\).*expected \(2, 1\)"),
        ({"pairs": torch.ones(2, 1)}, "pairs is torch.float32; expected bool"),
        ({"reference_mask": torch.ones(5).bool()}, r"mask is \(5,\).*expected \(1, 5\)"),
        ({"gate": torch.ones(1)}, r"gate is \(1,\).*expected \(2,\)"),
        ({"threshold": torch.ones(3)}, r"threshold has shape \(3,\)"),
        ({"seen": ((0,),)}, "seen=.*expected 2 rows of numbers below 1"),
        ({"seen": ((0,), (1,))}, "seen=.*expected 2 rows of numbers below 1"),
        ({"strength": torch.ones(3)}, r"strength has shape \(3,\).*a number, \(2,\) or \(2, 1\)"),
    ],
)
def test_errors_say_what_was_given(change, message):
    arguments = {
        "x": torch.zeros(2, 4, 8),
        "reference": torch.zeros(1, 5, 8),
        "strength": 0.9,
        "threshold": 0.7,
    } | change
    with pytest.raises(dispatch.KernelError, match=message):
        token_match_merge(**arguments)
