"""Latent anchoring as mathematics: anchors that keep their distance, losses, packed parameters, the loop's memory."""

import json

import pytest
import torch
from semiperm.methods.errors import MembraneError
from semiperm.methods.membranes.types import LowRank, Membrane
from semiperm.methods.training.adversary import adversarial_texts
from semiperm.methods.training.anchors import AnchorPool, acceptance
from semiperm.methods.training.config import TrainingConfig, read_training
from semiperm.methods.training.loop import TrainingLog, load_checkpoint, save_checkpoint
from semiperm.methods.training.objectives import anchoring_loss, erasing_loss, erasing_target
from semiperm.methods.training.packed import PackedMembranes, Site
from semiperm.methods.training.plot import training_plot
from semiperm.methods.training.trajectory import expected_ratio, log_ratio, noisy_step, trajectory_loss
from torch import nn


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- anchors -------------------------------------------------------------------------------------------------------


def pool(power=1.0, source="captions", count=40, **more):
    """Captions in eight dimensions about a large common mean; the concept is the first direction."""
    hidden = torch.randn(count, 2, 4, generator=noise()) + 50.0
    concept = hidden.mean(0, keepdim=True).clone()
    concept[0, 0, 0] += 5.0
    return AnchorPool(hidden, torch.randn(count, 3, generator=noise(1)), concept, power, source, **more)


def test_acceptance_is_the_papers():
    centre = torch.zeros(1, 2)
    near, away, against, between = [[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]], [[1.0, 1.0]]
    candidates = torch.tensor([near, away, against, between])
    got = acceptance(candidates, torch.tensor([[[2.0, 0.0]]]), centre, 2.0)
    torch.testing.assert_close(got, torch.tensor([0.0, 1.0, 0.0, (1 - 0.5**0.5) ** 2]))
    assert acceptance(candidates, torch.tensor([[[2.0, 0.0]]]), centre, 0.0).tolist() == [1.0] * 4


@pytest.mark.parametrize("source", ["captions", "latent"])
def test_anchors_keep_away_from_the_concept(source):
    """With a power of 0 the mean |cosine| is that of the pool; rejection makes it smaller, and more so with more."""

    def mean_cosine(power):
        drawn = pool(power, source)
        anchors, pooled = drawn.draw(300, noise(2))
        assert pooled.shape == (300, 3)
        return float((1 - acceptance(anchors, drawn.concepts, drawn.hidden.mean(0), 1.0)).mean())

    plain, once, often = (mean_cosine(power) for power in (0.0, 1.0, 6.0))
    assert plain > 1.1 * once and once > 1.2 * often


def test_latent_anchors_have_the_pools_mean_and_spread():
    drawn = pool(0.0, "latent", count=30)
    anchors, _ = drawn.draw(2000, noise(3))
    torch.testing.assert_close(anchors.mean(0), drawn.hidden.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(anchors.std(0), drawn.hidden.std(0), atol=0.15, rtol=0)


def test_both_take_turns_and_only_what_is_allowed_is_drawn():
    drawn = pool(1.0, "both", allowed=(3, 4, 5))
    anchors, _ = drawn.draw(6, noise(4))
    is_caption = [bool((drawn.hidden == anchor).flatten(1).all(1).any()) for anchor in anchors]
    assert is_caption == [True, False] * 3
    only = pool(1.0, "captions", allowed=(3, 4, 5)).draw(50, noise(5))[0]
    assert all(any(torch.equal(anchor, drawn.hidden[i]) for i in (3, 4, 5)) for anchor in only)


def test_a_pool_of_the_concept_alone_is_refused():
    with pytest.raises(MembraneError, match="1 captions are left"):
        pool(allowed=(3,))
    line = torch.tensor([-1.0, 1.0])[:, None, None] * torch.ones(2, 1, 2)  # everything lies along the concept
    with pytest.raises(MembraneError, match="none of 1000 proposals"):
        AnchorPool(line, None, line[1:], 1.0, "both").draw(2, noise())


# ---- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_one_target_for_all_kinds_of_prediction(kind):
    """At one latent the target of another kind of prediction is the noise target, converted."""
    from semiperm.methods.sampling import parts_of

    z, concept, surrogate = (torch.randn(2, 4, 3, 3, generator=noise(n)) for n in range(3))
    image, level = (torch.tensor(0.6), torch.tensor(0.8)) if kind == "v_prediction" else torch.tensor([0.3, 0.7])
    as_noise = [parts_of(kind, z, e, image, level)[1] for e in (concept, surrogate)]
    converted = parts_of(kind, z, erasing_target(concept, surrogate, 1.5), image, level)[1]
    torch.testing.assert_close(converted, erasing_target(*as_noise, 1.5))


def test_losses_are_means_over_the_latent():
    a, b = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    b[1] = 2.0
    assert erasing_loss(a, b).tolist() == anchoring_loss(a, b).tolist() == [0.0, 4.0]
    assert erasing_target(torch.tensor(3.0), torch.tensor(1.0), 0.0) == 1.0
    assert erasing_target(torch.tensor(3.0), torch.tensor(1.0), 2.0) == -3.0


def test_the_adversary_comes_nearer_and_stays_within_its_radius():
    hidden, goal = torch.randn(3, 2, 4, generator=noise()), torch.randn(3, 2, 4, generator=noise(1))
    near = hidden[2:] + 0.01 * goal[2:]
    goal = torch.cat([goal[:2], near])  # the last one's lies inside the ball

    def loss_of(asked):
        return (asked - goal).square().flatten(1).sum(1)

    found = adversarial_texts(loss_of, hidden, 20, 0.2)
    away = (found - hidden).flatten(1).norm(dim=1) / hidden.flatten(1).norm(dim=1)
    assert not found.requires_grad and (away <= 0.2 + 1e-5).all() and (away[:2] > 0.19).all()
    assert (loss_of(found) < loss_of(hidden)).all() and away[2] < 0.05
    # on the edge, the nearest point to the goal
    torch.testing.assert_close(
        loss_of(found)[:2].sqrt(),
        loss_of(hidden)[:2].sqrt() - 0.2 * hidden[:2].flatten(1).norm(dim=1),
        rtol=0.02,
        atol=0,
    )
    with pytest.raises(MembraneError, match="radius 0"):
        adversarial_texts(loss_of, hidden, 3, 0.0)


# ---- trajectories ----------------------------------------------------------------------------------------------------


def levels(kind, noise_level):
    """(a, s) of one noise level in 0..1 as (1, 1, 1, 1) each."""
    s = torch.full((1, 1, 1, 1), noise_level, dtype=torch.float64)
    return (1 - s if kind == "flow" else (1 - s.square()).sqrt()), s


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_a_noisy_step_is_the_posterior_of_the_noising(kind):
    """With the true image predicted: the product of two Gaussians of the forward process, for all kinds."""
    from semiperm.methods.sampling import parts_of

    image, pure = torch.randn(2, 1, 2, 3, 3, generator=noise(), dtype=torch.float64)
    (a, s), (a_then, s_then) = levels(kind, 0.8), levels(kind, 0.5)
    z = a * image + s * pure
    truth = {"epsilon": pure, "v_prediction": a * pure - s * image, "flow": pure - image}[kind]
    torch.testing.assert_close(parts_of(kind, z, truth, a, s)[0], image)
    mean, sigma = noisy_step(kind, z, truth, (a, s), (a_then, s_then))
    # p(z' | image) = N(a' image, s'^2); p(z | z') = N(a / a' z', s^2 - (a / a' s')^2)
    ratio, spread = a / a_then, s.square() - (a / a_then * s_then).square()
    precision = 1 / s_then.square() + ratio.square() / spread
    torch.testing.assert_close(sigma.square(), 1 / precision)
    torch.testing.assert_close(mean, (a_then * image / s_then.square() + ratio * z / spread) / precision)
    assert float(noisy_step(kind, z, truth, (a, s), (torch.ones_like(a), torch.zeros_like(s)))[1].max()) == 0.0


def test_the_log_ratio_is_that_of_two_gaussians():
    drawn, mean, reference = torch.randn(3, 2, 1, 4, 4, generator=noise())
    one, other = (torch.distributions.Normal(m, 0.7).log_prob(drawn).flatten(1).mean(1) for m in (mean, reference))
    torch.testing.assert_close(log_ratio(drawn, mean, reference, torch.tensor(0.7)), one - other)
    assert log_ratio(drawn, reference, reference, torch.tensor(0.7)).tolist() == [0.0, 0.0]
    means = [m.repeat(20_000, 1, 1, 1) for m in (mean, reference)]
    many = means[1] + 0.7 * torch.randn(means[1].shape, generator=noise(1))
    sampled = log_ratio(many, *means, torch.tensor(0.7))
    expected = expected_ratio(mean, reference, torch.tensor(0.7))
    torch.testing.assert_close(sampled.view(20_000, 2).mean(0), expected, rtol=0.02, atol=0.01)
    ratio = torch.tensor([-0.5, 1.5])
    whole = trajectory_loss(torch.tensor(1.0), ratio, ratio, 2.5)
    assert whole.tolist() == [4.0, 0.0], "where S is its own expectation, the square as it stands"


def test_trajectory_balance_brings_one_policy_to_the_other():
    """One step, one number: the mean of a Gaussian goes to the reference's, and log Z to log beta."""
    mean, flow = nn.Parameter(torch.tensor([[1.5]])), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([{"params": [mean]}, {"params": [flow], "lr": 0.1}], lr=0.1)
    generator, reference, sigma = noise(), torch.tensor([[-1.0]]), torch.tensor(0.5)
    for _ in range(600):
        drawn = reference + sigma * torch.randn(32, 1, generator=generator)
        ratio = log_ratio(drawn, mean.expand(32, 1), reference.expand(32, 1), sigma)
        expected = expected_ratio(mean.expand(32, 1), reference.expand(32, 1), sigma)
        trajectory_loss(flow, ratio, expected, 2.5).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(mean.item() + 1) < 0.01 and abs(flow.item() - 2.5) < 0.01


# ---- packed parameters -----------------------------------------------------------------------------------------------


def packed(names=("robot", "ghost"), start=None):
    shapes = {"lora_unet_a": (6, 5), "lora_unet_b": (3, 6)}
    return PackedMembranes(shapes, names, 2, [start] * len(names), seed=0)


def test_rows_see_their_own_membrane_and_the_sum_of_several_is_that_of_single_ones():
    both, layer, x = packed(), nn.Linear(5, 6), torch.randn(4, 7, 5, generator=noise())
    for own in both.parameters:
        for name, p in own.items():
            p.data = torch.randn(p.shape, generator=noise(len(name)))
    site = Site(both, "lora_unet_a")
    untouched = layer(x)
    assert torch.equal(site(layer, layer, x), untouched)  # outside of a call nothing acts

    with both.on([1, 0, 1, 1]):
        y = site(layer, layer, x)
    for row, k in enumerate([1, 0, 1, 1]):
        own = both.parameters[k]
        expected = untouched[row] + x[row] @ own["lora_unet_a.down"].T @ own["lora_unet_a.up"]
        torch.testing.assert_close(y[row], expected)

    with both.on([0, 1, 0, 1]):
        y = site(layer, layer, torch.cat([x[:1]] * 4))
    deltas = y - untouched[:1]
    stack = [both.membrane(k, Membrane(n, {"a": LowRank(torch.ones(1, 1), torch.ones(1, 1), 1.0)}))
             for k, n in enumerate(both.names)]  # fmt: skip
    from semiperm.methods.membranes.packing import pack

    down, up, _ = pack(stack, "lora_unet_a")
    torch.testing.assert_close(x[0] @ down.T @ up, deltas[0] + deltas[1])


def test_gates_say_how_far_a_membrane_is_open_and_are_differentiated():
    both, layer, x = packed(), nn.Linear(5, 6), torch.randn(3, 5, generator=noise())
    both.parameters[0]["lora_unet_a.up"].data.fill_(0.5)
    site, gates = Site(both, "lora_unet_a"), torch.tensor([1.0, 0.25, 0.0], requires_grad=True)
    with both.on([0, 0, 0]):
        whole = site(layer, layer, x) - layer(x)
    with both.on([0, 0, 0], gates):
        y = site(layer, layer, x)
        y.sum().backward()
    torch.testing.assert_close(y - layer(x), whole * gates[:, None])
    torch.testing.assert_close(gates.grad, whole.sum(1))
    assert torch.equal(y[2], layer(x)[2])


def test_gradients_stay_with_their_membrane():
    both, layer = packed(), nn.Linear(5, 6)
    with both.on([1, 1]):
        Site(both, "lora_unet_a")(layer, layer, torch.ones(2, 5)).sum().backward()
    assert all(p.grad is None for p in both.parameters[0].values())
    assert both.parameters[1]["lora_unet_a.up"].grad.abs().sum() > 0


def test_a_membrane_begins_the_same_whoever_is_trained_beside_it():
    alone, beside = packed(("ghost",)), packed(("robot", "ghost"))
    for name, p in alone.parameters[0].items():
        assert torch.equal(p, beside.parameters[1][name])
    assert not torch.equal(beside.parameters[0]["lora_unet_a.down"], beside.parameters[1]["lora_unet_a.down"])


def test_a_start_keeps_its_edit_at_its_own_rank():
    pair = LowRank(torch.randn(3, 5, generator=noise()), torch.randn(6, 3, generator=noise(1)), 1.5)
    start = Membrane("robot", {"lora_unet_a": pair}, surrogate="tree")
    back = packed(("robot",), start).membrane(0, start)
    got = back.modules["lora_unet_a"]
    torch.testing.assert_close(got.up @ got.down * got.scale, pair.up @ pair.down * pair.scale)
    assert got.rank == 3 and back.modules["lora_unet_b"].rank == 2 and not back.modules["lora_unet_b"].up.any()
    with pytest.raises(MembraneError, match="not among the 2"):
        packed(("robot",), Membrane("robot", {"lora_unet_c": pair}))


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_brings_back_every_bit(tmp_path):
    def run(steps, begin=None):
        p, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([p, idle], 0.1)
        first = load_checkpoint(begin, {"p": p, "idle": idle}, [optimizer])[0] if begin else 0
        for step in range(first, steps):
            (p * torch.arange(3.0) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        save_checkpoint(
            tmp_path / f"{steps}.safetensors", steps, {"p": p, "idle": idle}, [optimizer], {"x": p.detach()}
        )
        return p

    whole = run(6)
    run(4)
    assert torch.equal(run(6, tmp_path / "4.safetensors"), whole)


def test_the_log_forgets_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "log.jsonl"
    log = TrainingLog(path)
    for step in (10, 20, 30):
        log.count(loss=float(step))
        log.count(loss=float(step + 2))
        log.write(step)
    path.write_text(path.read_text() + '{"step": 35, "lo')  # killed while it wrote
    again = TrainingLog(path, 20)
    assert [row["step"] for row in again.rows] == [10, 20] and again.rows[0]["loss"] == 11.0
    again.write(30, validation={"robot": 1})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20, 30]


def test_the_plot_shows_every_figure():
    rows = [{"step": 0, "validation": {"robot": {"loss": 1.0, "erased": 1.0, "moved": 0.0}}}]
    rows += [
        {"step": s, "loss": 1 / s, "erasing": 1 / s, "anchoring": 1e-3,
         "validation": {"robot": {"loss": 1.0, "erased": 1 / s, "moved": 0.01 * s}}} for s in (10, 20)
    ]  # fmt: skip
    image = training_plot(rows)
    assert image.width > 3 * 400 and len(image.getcolors(1 << 20)) > 3
    assert training_plot(rows[:1]).width < image.width  # before the first step there is no loss to draw
    assert training_plot([]).size[0] > 0


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"layers": "none"},
        {"anchor_source": "noise"},
        {"learning_rate": 0},
        {"push": float("nan")},
        {"gradient_checkpointing": "yes"},
        {"sampling_steps": 1},
        {"batch_size": True},
        {"objective": "path"},
        {"flow_target": -1.0},
        {"adversary_gate": "official"},
        {"adversary_steps": 2, "objective": "trajectory"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(MembraneError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


def test_a_run_is_read_from_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('concepts = ["robot|android"]\nsurrogate = "tree"\n[training]\nsteps = 7\nlearning_rate = 1e-2\n')
    read = read_training(path)
    assert read.concepts == ("robot|android",) and read.surrogate == "tree" and read.preserve is None
    assert TrainingConfig(**read.settings).steps == 7
    for text, match in (
        ("[training]\nstep = 7", "step;"),
        ("concepts = 3", "concepts = 3"),
        ("concept = []", "concept = "),
        ("[training]\nsteps = 0", "steps=0"),
        ("training = 3", "no table"),
        ("= 3", "no readable TOML"),
    ):
        path.write_text(text)
        with pytest.raises(MembraneError, match=match):
            read_training(path)
