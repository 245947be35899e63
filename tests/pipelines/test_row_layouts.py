"""Which rows of a call are guided towards their text: by the text, in whatever order a pipeline puts them."""

import pytest
import torch
from contracts.membranes import strong
from contracts.token_merging import away
from diffusers import (
    FluxImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from semiperm import row_layout
from semiperm.methods.errors import SemipermError, TokenMergingError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.pipelines.membranes.apply import apply_membranes, remove_membranes
from semiperm.pipelines.membranes.erase import erase_concepts
from semiperm.pipelines.rows import Encoded, chunks_of, negative_rows
from semiperm.pipelines.text import encode_text
from tiny_models import LENGTH, _unet, build, call

PICTURE = Image.new("RGB", (16, 16), (200, 30, 30))
PROMPTS = ["a photo of a robot", "a painting of a dog"]


def membranes(pipe, **settings):
    return apply_membranes(pipe, strong(pipe), MembraneConfig(**({"gate": "always"} | settings)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kinds(handle) -> str:
    return " ".join(row["kind"][:3] for row in handle.report()["rows"])


def pushed(handle) -> set:
    return {(row["kind"], row["image"]) for row in handle.report()["rows"] if row["pushed"]}


def instruct():
    pipe = build("sd15")
    torch.manual_seed(0)
    pipe.unet = _unet(32, in_channels=8).eval()
    return quiet(StableDiffusionInstructPix2PixPipeline(**pipe.components, requires_safety_checker=False))


def draw_instruct(pipe):
    noise = torch.Generator().manual_seed(0)
    return pipe(PROMPTS[0], PICTURE, 2, negative_prompt="a cat", output_type="latent", generator=noise).images


def test_perturbed_attention_has_a_third_row():
    base = build("sd15")
    pipe = quiet(StableDiffusionPAGPipeline.from_pipe(base, pag_applied_layers=["mid"]))
    for applied in (base, pipe):  # heard by its text encoder, and told by itself
        with membranes(applied) as handle:
            call(pipe, PROMPTS, negative_prompt=["a cat"] * 2, pag_scale=2.0)
            assert kinds(handle) == "neg neg pos pos pos pos"
            call(pipe, PROMPTS, pag_scale=2.0, guidance_scale=1.0)
            assert kinds(handle) == "pos pos pos pos"
        remove_membranes(pipe)
        guided = {"negative_prompt": ["a cat"], "pag_scale": 2.0}
        with membranes(applied):  # each picture by itself, although a projection sees a part of the rows
            both = call(pipe, PROMPTS, **guided | {"negative_prompt": ["a cat"] * 2})
            single = [call(pipe, [prompt], seed=seed, **guided) for seed, prompt in enumerate(PROMPTS)]
        torch.testing.assert_close(torch.cat(single), both, atol=2e-5, rtol=1e-4)
        with away(applied) as handle:
            call(pipe, PROMPTS, negative_prompt=["a cat"] * 2, pag_scale=2.0)
            assert pushed(handle) == {("positive", 0), ("positive", 1)}


def test_instruct_pix2pix_has_the_conditional_row_first():
    pipe = instruct()
    with membranes(pipe) as handle:
        draw_instruct(pipe)
        assert kinds(handle) == "pos neg neg"
    with away(pipe) as handle:
        draw_instruct(pipe)
        assert pushed(handle) == {("positive", 0)}
    assert erase_concepts(pipe, "robot", max_sequence_length=LENGTH).concepts == ("robot",)


def test_modular_pipelines_call_for_each_condition():
    pipe = build("sdxl")
    modular = StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**{k: v for k, v in pipe.components.items() if v is not None})
    modular.set_progress_bar_config(disable=True)

    def draw():
        return modular(
            prompt=PROMPTS[0],
            negative_prompt="a cat",
            num_inference_steps=2,
            height=16,
            width=16,
            output="latents",
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )

    bare = draw()
    with membranes(pipe) as handle:
        changed = draw()
        assert kinds(handle) == "pos neg" and len(handle.report()["steps"]) == 2
    with away(pipe) as handle:
        draw()
        assert pushed(handle) == {("positive", 0)}
    assert torch.equal(draw(), bare) and not torch.allclose(changed, bare, atol=1e-3)


def test_flux_image_to_image_guides_by_two_calls_and_does_not_say_so():
    base = build("flux")
    pipe = quiet(FluxImg2ImgPipeline.from_pipe(base))
    settings = {"true_cfg_scale": 3.0, "height": 16, "width": 16, "strength": 0.9, "max_sequence_length": LENGTH}
    for applied in (base, pipe):
        with membranes(applied) as handle:
            pipe(
                PROMPTS[0],
                negative_prompt="a cat",
                image=PICTURE,
                num_inference_steps=3,
                output_type="latent",
                **settings,
            )
            assert kinds(handle) == "pos neg"


def test_the_refiner_has_the_second_text_encoder_alone():
    base = build("sdxl")
    parts = dict(base.components)
    torch.manual_seed(0)
    parts |= {"text_encoder": None, "tokenizer": None}
    parts["unet"] = _unet(
        32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 5 * 8,
        transformer_layers_per_block=(1, 2),
    ).eval()
    pipe = quiet(StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True, add_watermarker=False))
    erased = erase_concepts(
        pipe, "robot", templates=["a photo of a {}"], preserve=["a dog"], max_sequence_length=LENGTH
    )
    with apply_membranes(pipe, erased) as handle:
        pipe(PROMPTS[0], image=PICTURE, num_inference_steps=4, output_type="latent")
        rows = {row["prompt"]: row["gamma"]["robot"] for row in handle.report()["rows"] if row["kind"] == "positive"}
        assert rows == {PROMPTS[0]: 1.0}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_embeddings_without_negative_ones(family):
    pipe = build(family)
    features = encode_text(pipe, PROMPTS, max_sequence_length=LENGTH)
    given = {"prompt_embeds": features.hidden}
    if features.pooled is not None:
        given["pooled_prompt_embeds"] = features.pooled
    if family == "sd3":  # whose pipeline encodes an empty negative prompt for one picture alone
        given = {name: value[:1] for name, value in given.items()}
    bare = call(pipe, None, **given)
    with membranes(pipe, gate="paper") as handle:
        changed = call(pipe, None, **given)
        assert kinds(handle).count("neg") == kinds(handle).count("pos") == len(bare)
    assert changed.shape == bare.shape


def test_unknown_rows_are_refused_or_said():
    pipe = build("sd15")
    with away(pipe) as handle, torch.no_grad():
        text = encode_text(pipe, ["", PROMPTS[0]]).hidden
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with pytest.raises(TokenMergingError, match="row_layout"):
            pipe.unet(sample, 500, text)
        with row_layout("negative", "positive"):
            pipe.unet(sample, 500, text)
        assert pushed(handle) == {("positive", 0)}
        with pytest.raises(SemipermError, match="3 parts"), row_layout("negative", "positive", "positive"):
            pipe.unet(sample, 500, text)
    with pytest.raises(SemipermError, match="expected 'positive' or 'negative'"), row_layout("maybe"):
        pass


def test_a_prompt_that_equals_its_negative_prompt_is_told_by_its_place():
    pipe = build("sd15")
    with membranes(pipe) as handle:
        call(pipe, ["", "a dog"], negative_prompt=["", "a cat"])
        assert kinds(handle) == "neg neg pos pos"


def test_what_was_only_read_is_no_negative_row_by_itself():
    """The second text that an encoder read may be anything, until the first was seen as a prompt."""
    text = torch.randn(2, 5, 4)
    texts = [Encoded(text[:1], False, sure=False), Encoded(text[1:], True, sure=False)]
    assert negative_rows(text, texts, one_call=True) == (False, True)
    assert negative_rows(torch.randn(2, 5, 4), texts, one_call=True) == (None, None)
    pipe = build("sd15")
    with membranes(pipe) as handle, torch.no_grad():
        for prompt in PROMPTS:
            ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
            hidden = pipe.text_encoder(ids)[0]
        pipe.unet(torch.zeros(1, 4, 8, 8), 500, hidden)
        assert kinds(handle) == "pos"


def test_chunks_have_one_row_a_picture():
    assert chunks_of((True, True, False, False)) == (False, True)
    assert chunks_of((True, False, False)) == (False, True, True)
    assert chunks_of((False,) * 4) == (True,) and chunks_of((False,) * 4, 2) == (True, True)
