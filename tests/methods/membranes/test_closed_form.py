"""Closed-form membranes against independent float64 oracles: direct weight edits, normal equations, known answers."""

import math
import time

import pytest
import torch
from semiperm.methods.errors import MembraneError
from semiperm.methods.membranes.base_model import base_model_hash
from semiperm.methods.membranes.closed_form import (
    ClosedFormConfig,
    aligned_pairs,
    closed_form_edit,
    closed_form_edits,
    closed_form_membrane,
    derive_embeddings,
)
from semiperm.methods.membranes.gates import fit_probe, probe_gate
from semiperm.methods.membranes.packing import fold, pack
from semiperm.methods.membranes.uce import uce_membranes

PLAIN = {"push": 0.0}  # no step beyond the target: the textbook objective


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projections(d, seed=100):
    return {f"lora_unet_p{i}": randn(out, d, seed=seed + i) for i, out in enumerate((5, 17, 32))}


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def uce_directly(weight, concept, target, preserve, ridge, erase, keep):
    """UCE's own formula, term by term."""
    left, right = ridge * weight.clone(), ridge * torch.eye(weight.shape[1], dtype=torch.float64)
    for e, g in zip(concept, target, strict=True):
        left += erase * torch.outer(weight @ g, e)
        right += erase * torch.outer(e, e)
    for c in preserve:
        left += keep * torch.outer(weight @ c, c)
        right += keep * torch.outer(c, c)
    return left @ torch.linalg.inv(right)


def normal_equations(concepts, targets, preserve, config):
    """Each concept's full-rank minimiser A_k and its metric M_k, row by row."""
    d, count = preserve.shape[1], len(concepts)
    mean_square = sum((r**2).mean() for r in concepts) / count
    ridge = config.ridge * ((preserve**2).mean() + mean_square) / 2
    solutions = []
    for k, (rows, goals) in enumerate(zip(concepts, targets, strict=True)):
        metric, share = ridge * torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        for c in preserve:
            metric += config.preserve_scale / len(preserve) * torch.outer(c, c)
        for e, g in zip(rows, goals, strict=True):
            metric += config.erase_scale / len(rows) * torch.outer(e, e)
            share += config.erase_scale / len(rows) * (1 + config.push) * torch.outer(g - e, e)
        for other in concepts[:k] + concepts[k + 1 :]:
            for e in other:
                metric += config.preserve_scale / count / len(other) * torch.outer(e, e)
        solutions.append((share @ torch.linalg.inv(metric), metric))
    return solutions


# ---- UCE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "count", "kept"), [(13, 1, 7), (37, 3, 50), (128, 5, 200), (31, 2, 0)])
def test_rank_one_membranes_are_the_direct_uce_weight_edit(d, count, kept):
    weights, concept, target, preserve = (
        projections(d),
        randn(count, d),
        randn(count, d, seed=1),
        randn(kept, d, seed=2),
    )
    names = [f"c{i}" for i in range(count)]
    made = uce_membranes(weights, concept, target, preserve, names, ridge=0.5, erase_scale=1.3, preserve_scale=0.7,
                         dtype=torch.float64)  # fmt: skip
    assert made.concepts == tuple(names) and all(p.rank == 1 for m in made for p in m.modules.values())
    for key, weight in weights.items():
        down, up, owner = pack(made, key, dtype=torch.float64)
        edited = fold(weight, down, up, torch.ones(count, dtype=torch.float64)[owner])
        direct = uce_directly(weight, concept, target, preserve, 0.5, 1.3, 0.7)
        assert relative(edited - weight, direct - weight) < 1e-10


def test_stored_uce_membranes_are_float32_and_know_their_base_model():
    weights = projections(13)
    (made,) = uce_membranes(weights, randn(1, 13), randn(1, 13, seed=1), randn(4, 13), ["robot"], surrogate="toy")
    assert made.method == "closed_form/uce" and made.surrogate == "toy" and made.base_model == base_model_hash(weights)
    assert {t.dtype for p in made.modules.values() for t in (p.down, p.up)} == {torch.float32}


# ---- the general edit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("push", [0.0, 0.75])
@pytest.mark.parametrize("count", [1, 3])
def test_full_rank_edits_solve_the_normal_equations(count, push):
    d = 19
    config = ClosedFormConfig(rank=d, push=push, erase_scale=1.7, preserve_scale=2.5, ridge=0.02)
    sizes = (9, 19, 30)[:count]  # fewer rows than d, as many, more
    concepts = [randn(n, d, seed=n) for n in sizes]
    targets = [randn(n, d, seed=50 + n) for n in sizes]
    preserve = randn(40, d, seed=9)
    oracle = normal_equations(concepts, targets, preserve, config)
    for (u, v), (best, _) in zip(closed_form_edits(concepts, targets, preserve, config), oracle, strict=True):
        assert relative(u @ v, best) < 1e-10


def wide(x, beside=0.0):
    """Padded with columns of zeros, or of nearly zeros, that a solver has to count among the others."""
    return torch.cat((x[..., :5], torch.full_like(x[..., :8], beside), x[..., 5:]), dim=-1)


@pytest.mark.parametrize("method", ["uce", "null_space"])
def test_columns_of_zeros_are_left_out_exactly(method):
    given = [randn(9, 24, seed=1)], [randn(9, 24, seed=2)], 0.01 * randn(60, 24, seed=3) * torch.linspace(1, 9, 24)
    config = ClosedFormConfig(method=method, rank=9, ridge=0.05, null_threshold=2.0)
    found = []
    for beside in (0.0, 1e-14):
        concepts, targets, preserve = ([wide(t, beside) for t in g] if isinstance(g, list) else wide(g, beside)
                                       for g in given)  # fmt: skip
        ((u, v),) = closed_form_edits(concepts, targets, preserve, config)
        found.append(u @ v)
    assert relative(*found) < 1e-8 and not found[0][5:13].any() and not found[0][:, 5:13].any()


def test_one_embedding_per_concept_is_uce():
    d, weight = 23, randn(6, 23, seed=5)
    concepts, targets, preserve = [randn(1, d)], [randn(1, d, seed=1)], randn(10, d, seed=2)
    config = ClosedFormConfig(ridge=0.1, preserve_scale=3.0, **PLAIN)
    ((u, v),) = closed_form_edits(concepts, targets, preserve, config)
    absolute = 0.1 * ((preserve**2).mean() + (concepts[0] ** 2).mean()) / 2
    direct = uce_directly(weight, concepts[0], targets[0], preserve, absolute, 1.0, 3.0 / 10)
    assert u.shape == (d, 1) and v.shape == (1, d) and relative(weight @ u @ v, direct - weight) < 1e-10


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_best_of_its_rank_for_the_objective(rank):
    d = 21
    rows, preserve = randn(60, d) * torch.logspace(0, -1, d, dtype=torch.float64), randn(80, d, seed=2)
    goals = rows @ randn(d, d, seed=1)
    config = ClosedFormConfig(rank=rank, ridge=0.01, **PLAIN)
    ((solution, metric),) = normal_equations([rows], [goals], preserve, config)
    root = torch.linalg.cholesky(metric)
    left, values, right = torch.linalg.svd(solution @ root)  # |B - A|_M is the objective up to a constant
    best = (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)
    u, v = closed_form_edit(rows, goals, preserve, config)

    def excess(edit):
        return ((edit - solution) @ root).square().sum().item()

    assert u.shape == (d, rank) and excess(u @ v) <= excess(best) * (1 + 1e-6)
    for attempt in range(20):  # and no rank-r matrix near it does better
        trial = (u + 1e-3 * randn(d, rank, seed=attempt)) @ (v + 1e-3 * randn(rank, d, seed=99 + attempt))
        assert excess(trial) >= excess(u @ v) * (1 - 1e-9)


def test_neutral_scales_edit_nothing():
    rows, goals, preserve = randn(6, 9), randn(6, 9, seed=1), randn(5, 9, seed=2)
    u, v = closed_form_edit(rows, goals, preserve, ClosedFormConfig(erase_scale=0.0))
    assert not (u @ v).any()
    u, v = closed_form_edit(rows, rows, preserve)
    assert not (u @ v).any()


def test_the_random_stream_of_the_caller_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    closed_form_edit(randn(30, 19), randn(30, 19, seed=1), randn(5, 19))
    assert torch.equal(torch.rand(1), expected)


def world(d=40, concepts=3, per_concept=30, noise=0.05, seed=0):
    """Captions as points: a low-dimensional everyday subspace, plus one private direction per concept."""
    everyday, private = randn(6, d, seed=seed), randn(concepts, d, seed=seed + 1)
    preserve = randn(200, 6, seed=seed + 2) @ everyday + noise * randn(200, d, seed=seed + 3)
    rows, goals = [], []
    for k in range(concepts):
        base = randn(per_concept, 6, seed=10 + k) @ everyday + noise * randn(per_concept, d, seed=20 + k)
        rows.append(base + private[k])
        goals.append(base)
    return rows, goals, preserve


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "one_by_one"])
@pytest.mark.parametrize("method", ["uce", "null_space", "rece"])
def test_stacked_edits_erase_their_concepts_and_spare_the_rest(method, joint):
    rows, goals, preserve = world()
    config = ClosedFormConfig(method=method, rank=1, preserve_scale=2.0, **PLAIN)
    if joint:
        edits = closed_form_edits(rows, goals, preserve, config)
    else:
        edits = [closed_form_edit(r, g, preserve, config) for r, g in zip(rows, goals, strict=True)]

    def moved(x):
        return sum((x @ v.T) @ u.T for u, v in edits)

    for k, (row, goal) in enumerate(zip(rows, goals, strict=True)):
        distance = (goal - row).square().sum()
        left = 0.12 if method == "rece" else 0.05  # what RECE adds pulls at the fit
        assert (row + moved(row) - goal).square().sum() < left * distance  # its own concept lands on the surrogate
        u, v = edits[k]
        if joint:  # each membrane alone leaves the others' concepts in place
            for other in rows[:k] + rows[k + 1 :]:
                assert ((other @ v.T) @ u.T).square().sum() < 0.05 * distance
    assert moved(preserve).square().sum(1).mean() < 0.01 * (goals[0] - rows[0]).square().sum(1).mean()


def test_null_space_edits_never_move_the_frozen_directions():
    rows, goals, preserve = world(noise=0.0)
    for u, v in closed_form_edits(rows, goals, preserve, ClosedFormConfig(method="null_space", rank=2)):
        assert ((preserve @ v.T) @ u.T).abs().max() < 1e-10 * (goals[0] - rows[0]).abs().max()
    with pytest.raises(MembraneError, match="leaves no direction"):
        closed_form_edit(rows[0], goals[0], randn(99, 40), ClosedFormConfig(method="null_space", null_threshold=1e-9))


def test_null_space_solves_the_constrained_problem():
    rows, goals, preserve = randn(25, 12), randn(25, 12, seed=1), randn(30, 12, seed=2)
    config = ClosedFormConfig(method="null_space", rank=12, null_threshold=1.0, preserve_scale=2, ridge=0.05, **PLAIN)
    values, vectors = torch.linalg.eigh(preserve.T @ preserve / 30)
    basis = vectors[:, values <= values.mean()]
    ridge = 0.05 * ((preserve**2).mean() + (rows**2).mean()) / 2
    flat = rows @ basis
    metric = flat.T @ flat / 25 + 2 * basis.T @ (preserve.T @ preserve / 30) @ basis
    metric += ridge * torch.eye(basis.shape[1], dtype=torch.float64)
    expected = ((goals - rows).T @ flat / 25) @ torch.linalg.inv(metric) @ basis.T
    u, v = closed_form_edit(rows, goals, preserve, config)
    assert relative(u @ v, expected) < 1e-10


def test_derived_embeddings_minimise_the_rece_objective():
    d, weights = 11, list(projections(11).values())
    gram = sum(w.T @ w for w in weights)
    rows, edit = randn(3, d), (randn(d, 2, seed=1), randn(2, d, seed=2))
    derived = derive_embeddings(rows, edit, gram, ridge=0.1)
    ridge = 0.1 * gram.diagonal().mean()
    edited = [w + w @ edit[0] @ edit[1] for w in weights]
    for c, got in zip(rows, derived, strict=True):
        c_prime = got.clone().requires_grad_()
        loss = ridge * (c_prime**2).sum()
        for old, new in zip(weights, edited, strict=True):
            loss = loss + ((new @ c_prime - old @ c) ** 2).sum()
        (gradient,) = torch.autograd.grad(loss, c_prime)
        assert gradient.norm() < 1e-9 * (gram @ c).norm()


def test_rece_leaves_less_of_the_concept_to_be_found():
    rows, goals, preserve = world(concepts=1)
    gram = sum(w.T @ w for w in projections(40).values())

    def found(method):  # how close an attacker's embedding comes to the concept through the edit
        config = ClosedFormConfig(method=method, rank=1, preserve_scale=1.0, ridge=0.1, **PLAIN)
        u, v = closed_form_edit(rows[0], goals[0], preserve, config, gram=gram)
        attack = derive_embeddings(rows[0], (u, v), gram, ridge=0.01)
        return ((attack + (attack @ v.T) @ u.T - rows[0]) ** 2).sum() / ((goals[0] - rows[0]) ** 2).sum()

    assert found("rece") > found("uce")


def test_the_membrane_of_an_edit_is_the_edit_seen_through_the_weights():
    d = 15
    weights, rows, goals, preserve = projections(d), randn(20, d), randn(20, d, seed=1), randn(9, d, seed=2)
    edit = closed_form_edit(rows, goals, preserve, ClosedFormConfig(rank=2))
    made = closed_form_membrane(weights, edit, "robot", phrases=("robot", "android"), dtype=torch.float64)
    assert made.phrases == ("robot", "android") and made.base_model == base_model_hash(weights)
    x = randn(4, d, seed=8)
    for key, weight in weights.items():
        down, up, owner = pack([made], key, dtype=torch.float64)
        folded = fold(weight, down, up, torch.ones(1, dtype=torch.float64)[owner])
        expected = torch.stack([weight @ (e + edit[0] @ (edit[1] @ e)) for e in x])
        torch.testing.assert_close(x @ folded.T, expected, rtol=1e-11, atol=1e-11)
    half = closed_form_membrane(weights, edit, "robot", dtype=torch.float16)
    assert half.modules["lora_unet_p0"].up.dtype == torch.float16
    with pytest.raises(MembraneError, match="width 15"):
        closed_form_membrane({"lora_unet_p": randn(4, 16)}, edit, "robot")


def test_wrong_input_is_explained():
    rows, preserve = randn(4, 7), randn(5, 7)
    for bad in ([rows[:0]], [randn(4, 8)], [randn(3, 7)], []):
        with pytest.raises(MembraneError, match=r"two\s+equal \(n, d\)"):
            closed_form_edits([rows] if bad and len(bad[0]) else bad, bad, preserve)
    with pytest.raises(MembraneError, match="NaN or Inf"):
        closed_form_edit(rows, rows * math.nan, preserve)
    for wrong, message in (
        ({"method": "esd"}, "uce, null_space, rece"),
        ({"rank": 0}, "integer >= 1"),
        ({"ridge": 0.0}, "> 0"),
        ({"preserve_scale": -1.0}, ">= 0"),
        ({"push": math.inf}, "finite"),
    ):
        with pytest.raises(MembraneError, match=message):
            ClosedFormConfig(**wrong)
    with pytest.raises(MembraneError, match="2 names"):
        uce_membranes(projections(7), rows[:1], rows[:1], preserve, ["a", "b"])


# ---- pairs -----------------------------------------------------------------------------------------------------------


def positions(n):
    return torch.arange(n, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("phrase", "surrogate", "whole", "rows", "partners"),
    [
        ((2, 4), (2, 3), False, [3, 4, 5, 6, 7], [2, 3, 4, 5, 6]),  # shorter surrogate
        ((2, 3), (2, 4), False, [2, 3, 4, 5, 6, 7], [3, 4, 5, 6, 7, 7]),  # longer one: the last position serves twice
        ((2, 4), (2, 2), False, [3, 4, 5, 6, 7], [2, 2, 3, 4, 5]),  # empty: the token that follows
        ((2, 4), (2, 2), True, [2, 3, 4, 5, 6, 7], [2, 2, 2, 3, 4, 5]),
        ((2, 4), (1, 3), True, [2, 3, 4, 5, 6, 7], [2, 2, 3, 4, 5, 6]),
        ((6, 8), (8, 8), False, [7], [7]),  # at the very end: the one before
    ],
)
def test_aligned_pairs_by_hand(phrase, surrogate, whole, rows, partners):
    got, target = aligned_pairs(positions(8), positions(8), phrase, surrogate, whole_phrase=whole)
    assert got.flatten().tolist() == rows and target.flatten().tolist() == partners


def test_aligned_pairs_of_unequal_lengths_and_errors():
    got, target = aligned_pairs(positions(9), positions(5), (1, 2), (1, 2))
    assert got.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and target.flatten().tolist() == [1, 2, 3, 4, 4, 4, 4, 4]
    for phrase, surrogate in (((2, 2), (2, 3)), ((2, 10), (2, 3)), ((2, 3), (3, 2)), ((2, 3), (2, 9))):
        with pytest.raises(MembraneError, match="expected start < end"):
            aligned_pairs(positions(9), positions(5), phrase, surrogate)


# ---- probe -----------------------------------------------------------------------------------------------------------


def captions(count, with_concept, seed, d=24, tokens=9):
    """Tokens of an anisotropic cloud; in a concept caption, all from a random position on carry a direction."""
    cloud = 0.6 * randn(count, tokens, d, seed=seed) * torch.linspace(2, 0.3, d, dtype=torch.float64) + 3.0
    if with_concept:
        direction = randn(d, seed=7) / randn(d, seed=7).norm()
        start = torch.randint(0, tokens - 1, (count,), generator=torch.Generator().manual_seed(seed))
        cloud += 4 * (torch.arange(tokens) >= start[:, None])[..., None] * direction
    return cloud.float()


def test_probe_separates_its_fit_set_exactly_and_generalises():
    probe = fit_probe(captions(60, True, 1), captions(200, False, 2))
    assert probe.separation > 0.2 and probe.weight.dtype == torch.float32
    assert (probe_gate(captions(60, True, 1), probe) == 1).all() and (
        probe_gate(captions(200, False, 2), probe) == 0
    ).all()
    assert (probe_gate(captions(300, False, 4), probe) == 0).float().mean() > 0.98
    assert (probe_gate(captions(300, True, 3), probe) == 1).float().mean() > 0.95


def test_probes_leave_columns_of_zeros_out_exactly():
    on, off = captions(40, True, 1), captions(80, False, 2)
    short, full = (fit_probe(wide(on, beside), wide(off, beside)) for beside in (0.0, 1e-12))
    assert relative(short.weight, full.weight) < 1e-5 and not short.weight[5:13].any()
    assert (short.low, short.high, short.separation) == pytest.approx((full.low, full.high, full.separation), rel=1e-4)


def test_probe_thresholds_lie_low_in_the_gap():
    on, off = captions(40, True, 1), captions(80, False, 2)
    probe = fit_probe(on, off)
    highest = torch.stack([(caption @ probe.weight).max() for caption in off]).double().quantile(0.99).item()
    lowest = min(float((caption @ probe.weight).max()) for caption in on)
    assert probe.low == pytest.approx(highest + (lowest - highest) * 0.35, abs=1e-5)
    assert probe.high == pytest.approx(highest + (lowest - highest) * 0.475, abs=1e-5)


def test_known_positions_tell_the_concept_from_what_its_captions_have_in_common():
    d, where = 24, torch.randint(0, 9, (60, 1), generator=torch.Generator().manual_seed(1))
    concept, habit = torch.eye(d)[0], torch.eye(d)[1]
    on = captions(60, False, 1) + 0.5 * habit
    on[torch.arange(60), where[:, 0]] += 2 * concept
    off = captions(200, False, 2)
    probes = fit_probe(on, off, where, rounds=1), fit_probe(on, off, rounds=1)
    share = [float(probe.weight @ concept / (probe.weight @ habit)) for probe in probes]
    assert share[0] > 1.5 * share[1] > 0


def test_overlapping_probe_still_opens_for_every_concept_caption():
    on, off = captions(40, True, 1), torch.cat((captions(40, False, 2), captions(5, True, 1)))
    probe = fit_probe(on, off)
    assert probe.separation <= 0 and (probe_gate(on, probe) >= 1 - 1e-5).all()


def test_probe_errors():
    with pytest.raises(MembraneError, match="none empty"):
        fit_probe(torch.zeros(2, 3, 4), torch.zeros(0, 3, 4))
    with pytest.raises(MembraneError, match=r"expected \(n, N, d\)"):
        fit_probe(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    with pytest.raises(MembraneError, match="NaN or Inf"):
        fit_probe(torch.full((2, 3, 4), math.nan), torch.zeros(2, 3, 4))


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.bench
@pytest.mark.parametrize(
    ("d", "count", "per", "kept", "limit"),
    [(128, 1, 2000, 9600, 0.2), (128, 50, 300, 9600, 1.0), (768, 50, 20, 3000, 1.5), (2048, 50, 1, 2000, 3.0)],
)
def test_algebra_is_quick(d, count, per, kept, limit):
    concepts = [randn(per, d, seed=k) for k in range(count)]
    targets, preserve = [randn(per, d, seed=99 + k) for k in range(count)], randn(kept, d, seed=2)
    weights = {f"lora_unet_p{i}": randn(128, d, seed=i) for i in range(20)}
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)  # seconds of one core, whatever else the machine does
    for _ in range(3):
        start = time.process_time()
        for k, edit in enumerate(closed_form_edits(concepts, targets, preserve)):
            closed_form_membrane(weights, edit, f"c{k}", base_model="0" * 16)
        seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    assert min(seconds) < limit
