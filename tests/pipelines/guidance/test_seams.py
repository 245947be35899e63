"""The three seams on real small diffusers classes, against what one would compute by hand."""

import functools

import pytest
import torch
from semiperm.methods.guidance.adavd import AdaVD
from semiperm.methods.guidance.category import Category
from semiperm.methods.guidance.config import SafeGuidanceConfig
from semiperm.methods.guidance.nag import NAG
from semiperm.methods.guidance.safree import SAFREE
from semiperm.methods.guidance.sld import PRESETS, SLD
from semiperm.pipelines.family import denoiser_of, family_of
from semiperm.pipelines.guidance.apply import apply_safe_guidance
from semiperm.pipelines.text import encode_text
from tiny_models import LENGTH, build, call

HARM = (Category("machines", ("a robot", "an android")), Category("houses", ("a house",)))
PROMPTS = ["a photo of a robot", "a painting of a house"]
SCALE, STEPS = 3.0, 4


@functools.cache
def pipeline(family):
    return build(family)


def drawn(pipe, **kwargs):
    return call(pipe, PROMPTS, negative_prompt=["a dog", ""], steps=STEPS, guidance_scale=SCALE, **kwargs)


def by_hand(pipe, preset):
    """Safe latent diffusion with three separate calls a step, in float64 where the paper has its formula."""
    family, (denoiser, _) = family_of(pipe), denoiser_of(pipe)
    length = {"max_sequence_length": LENGTH} if family.flow else {}
    texts = [encode_text(pipe, t, **length) for t in (["a dog", ""], PROMPTS)]
    harm = [encode_text(pipe, [c.text] * 2, **length) for c in HARM]
    pipe.scheduler.set_timesteps(STEPS)
    x = torch.cat([torch.randn(1, *_shape(pipe), generator=torch.Generator().manual_seed(i)) for i in range(2)])
    x = family.pack(pipe, x * getattr(pipe.scheduler, "init_noise_sigma", 1.0))
    warmup, big, lam, s_m, beta = PRESETS[preset]
    m = torch.zeros(x.shape, dtype=torch.float64)
    latents = torch.zeros(2, *_shape(pipe))

    def predict(x, t, text):
        inputs = family.inputs(pipe, latents, text.hidden, text.pooled)
        step = t.expand(2) * (family.noise_timestep / 1000)
        return denoiser(x, timestep=step, encoder_hidden_states=text.hidden, return_dict=False, **inputs)[0]

    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            u, c, *branches = (predict(x, t, text).double() for text in (*texts, *harm))
            unit = 1 - float(t) / 1000 if family.flow else 1.0
            share = _share(float(t), pipe) if family.flow else 1 - float(t) / 999
            guided = c.clone()
            if unit > 1e-3:
                along = [((c - u) * (s - u)).flatten(1).sum(1) / (s - u).flatten(1).norm(dim=1) for s in branches]
                pick = torch.stack(along).argmax(0)
                s = torch.stack(branches)[pick, torch.arange(2)]
                d = (c - s) * unit
                mu = torch.where(d >= lam, torch.zeros_like(d), (d.abs() * big).clamp(max=1))
                gamma = (s - u) * unit * mu + s_m * m
                m = beta * m + (1 - beta) * gamma
                guided = c - (gamma / unit if share >= warmup else 0)
            x = pipe.scheduler.step((u + SCALE * (guided - u)).float(), t, x, return_dict=False)[0]
    return x


def _share(t, pipe):
    sigma, shift = t / 1000, pipe.scheduler.config.shift
    return 1 - sigma / (shift - (shift - 1) * sigma)


def _shape(pipe):
    denoiser, _ = denoiser_of(pipe)
    return (denoiser.config.in_channels // (4 if family_of(pipe).packed else 1), 8, 8)


@pytest.mark.parametrize("preset", ["strong", "max"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_one_batched_call_is_three_calls_by_the_papers_formula(family, preset):
    pipe = pipeline(family)
    expected, plain = by_hand(pipe, preset), untouched(family)
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, SLD(preset))) as handle:
        found = drawn(pipe)
        assert float((found - expected).norm() / expected.norm()) < 1e-5
        assert float((found - expected).norm()) < 0.01 * float((plain - expected).norm())
        assert handle.report()["evaluations"] == STEPS * 2 * len(HARM)


def test_two_calls_are_one():
    """Flux's true guidance by two calls: the second is answered from the first, whatever the scale."""
    pipe, calls = pipeline("flux"), []
    seen = pipe.transformer.proj_out.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, SLD("max"))):
            found = drawn(pipe)
    finally:
        seen.remove()
    assert calls == [2 + 2 + 2 * len(HARM)] * STEPS
    # with a scale of 1 + tiny the pipeline itself says what it was given for the prompt
    assert torch.isfinite(found).all() and not torch.equal(found, untouched("flux"))


@functools.cache
def untouched(family):
    return drawn(pipeline(family))


def test_safree_gives_its_text_to_prompts_alone_and_in_its_window():
    pipe, seen = pipeline("sd15"), []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    algorithm = SAFREE(alpha=0.0, reach=0.9)
    try:
        with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, algorithm)) as handle:
            drawn(pipe)
            until = handle.now.prompts.until
            edited = handle.now.prompts.edited
    finally:
        hook.remove()
    given = encode_text(pipe, PROMPTS).hidden
    assert torch.equal(seen[0][:2], encode_text(pipe, ["a dog", ""]).hidden)
    assert torch.equal(seen[0][2:], edited) and not torch.equal(edited, given)
    assert all(0.4 < u < 0.9 for u in until) and torch.equal(seen[-1][2:], given), "after it the prompt's own"


def test_safree_acts_in_the_first_step_of_a_run_of_few():
    pipe = pipeline("sd15")
    plain = call(pipe, PROMPTS, steps=2)
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, SAFREE(alpha=0.0, reach=0.02))) as handle:
        filtered = call(pipe, PROMPTS, steps=2)
        report = handle.report()
    assert not torch.equal(filtered, plain)
    assert [row["fired"] for row in report["rows"]] == [0.5, 0.5]
    assert report["steps"][0]["share"] > 0.02, "no step lies as early as its text is to be used"


def test_adavd_edits_what_the_layers_give_to_prompts():
    pipe, found = pipeline("sd15"), {}
    layer = pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    keep = layer.register_forward_hook(lambda m, a, k, out: found.update(out=out), with_kwargs=True)
    harm = encode_text(pipe, [HARM[0].phrases[0]]).hidden
    try:
        with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM[0], AdaVD(rank=1))) as handle:
            call(pipe, PROMPTS, negative_prompt=["", ""], steps=1)
            texts, (path,) = handle.texts, [p for p in handle.now.values if p.startswith("up_blocks.0.attentions.0")]
            cached = handle.now.values[path]
    finally:
        keep.remove()
    position = texts.positions[0][0]
    torch.testing.assert_close(cached[0], layer.to_v(harm[0, position]))
    assert torch.equal(texts.phrases[0], harm[0])


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_nag_works_without_guidance(family):
    pipe = pipeline(family)
    plain = call(pipe, PROMPTS, guidance_scale=1.0)
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, NAG())) as handle:
        found = call(pipe, PROMPTS, guidance_scale=1.0)
        report = handle.report()
    assert float((found - plain).norm() / plain.norm()) > 1e-3
    assert report["evaluations"] == (0 if family == "sd15" else 4), "cross-attention needs no row more"
    assert all(row["fired"] == 1 for row in report["rows"])


def test_nag_in_cross_attention_is_the_attention_over_both():
    pipe, seen = pipeline("sd15"), {}
    layer = pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, a, k: seen.update(x=a[0], text=k["encoder_hidden_states"]), with_kwargs=True
        ),
        layer.register_forward_hook(lambda m, a, out: seen.update(out=out)),
    ]
    nag = NAG(scale=3.0, alpha=0.5)
    try:
        with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, nag)) as handle:
            call(pipe, PROMPTS, guidance_scale=1.0, steps=1)
            together = handle.texts.together
    finally:
        for hook in hooks:
            hook.remove()

    def attend(text):
        split = lambda t: t.unflatten(-1, (layer.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(layer.to_q(seen["x"])), split(layer.to_k(text)), split(layer.to_v(text))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    with torch.no_grad():
        expected = nag.combine(attend(seen["text"]), attend(together.expand(2, -1, -1)), 1.0)
        torch.testing.assert_close(seen["out"], layer.to_out[0](expected), atol=1e-5, rtol=1e-5)


def test_silent_branches_are_left_out_and_looked_at_again():
    pipe = pipeline("sd15")
    quiet = SLD("max", patience=1, probe=2, silent=1.0)  # everything counts as silent
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM[1], quiet)) as handle:
        call(pipe, PROMPTS, negative_prompt=["", ""], steps=6)
        assert handle.report()["evaluations"] == 2 * 3, "steps 0, 2 and 4 of 6"


def test_branches_are_rows_of_the_images_that_need_them_alone():
    """With the first image alone loud, one row is added; beside another method, which counts rows, whole chunks."""
    pipe, calls = pipeline("sd15"), []
    seen = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    config = SafeGuidanceConfig(HARM[1], SLD("max", patience=1, probe=100, silent=-1.0))
    try:
        with apply_safe_guidance(pipe, config) as handle:
            everything = drawn(pipe)
            original = type(handle.new_record().branches).heard

            def first_alone(self, evaluated, loud):
                original(self, evaluated, loud & torch.tensor([[True, False]]))

            type(handle.new_record().branches).heard = first_alone
            try:
                calls.clear()
                alone = drawn(pipe)
                rows = list(calls)
            finally:
                type(handle.new_record().branches).heard = original
            assert rows == [6] + [5] * (STEPS - 1)
            assert handle.report()["evaluations"] == sum(rows) - 4 * STEPS
    finally:
        seen.remove()
    torch.testing.assert_close(alone[0], everything[0], atol=1e-4, rtol=1e-4)
    assert float((alone[1] - everything[1]).abs().max()) > 1e-3


def test_edited_values_are_made_once_a_run_and_again_where_the_layer_changed():
    pipe, made = pipeline("sd15"), []
    original = AdaVD.edit_values

    def edit(self, *args):
        made.append(1)
        return original(self, *args)

    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM[0], AdaVD(rank=1))) as handle:
        layers = sum(path.endswith("attn2.to_v") for path, _ in pipe.unet.named_modules())
        AdaVD.edit_values = edit
        try:
            drawn(pipe)
            assert len(made) == layers, "not once a step"
            made.clear()
            weight = next(m for p, m in pipe.unet.named_modules() if p.endswith("attn2.to_v")).weight

            def change(pipe, step, timestep, kwargs):
                if step == 1:
                    with torch.no_grad():
                        weight.mul_(1.0)
                return kwargs

            call(
                pipe, PROMPTS, negative_prompt=["", ""], steps=STEPS, guidance_scale=SCALE, callback_on_step_end=change
            )
            assert len(made) == layers + 1, "its own, from the step after"
        finally:
            AdaVD.edit_values = original
        assert handle.report()["rows"][0]["fired"] == 1


def test_safree_reads_the_categories_once_and_each_text_once():
    pipe, read = pipeline("sd15"), []
    encoder = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    try:
        with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, SAFREE(alpha=0.0))):
            drawn(pipe)
            first = sum(read)
            read.clear()
            drawn(pipe)
    finally:
        encoder.remove()
    words = sum(1 + len(prompt.split()) for prompt in PROMPTS)
    assert sum(read) == 4 + words and first == sum(read) + len(HARM) + 1 + 3, "3 phrases, 2 categories, all in one"


def test_a_second_order_scheduler_keeps_one_momentum_a_step():
    from diffusers import HeunDiscreteScheduler

    pipe = build("sd15")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    kept = []
    with apply_safe_guidance(pipe, SafeGuidanceConfig(HARM, SLD("max"))) as handle:
        momentum = handle.new_record().momentum
        original = type(momentum).keep

        def keep(self, value, update):
            kept.append(update)
            original(self, value, update)

        type(momentum).keep = keep
        try:
            drawn(pipe)
        finally:
            type(momentum).keep = original
    assert kept.count(True) == STEPS and len(kept) == 2 * STEPS - 1
