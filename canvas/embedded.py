"""The second edition's models as plain diffusers pipelines: `canvas-scenes`, `canvas-flow` and `canvas-turbo`.

A folder of weights holds tokenizer/, text-first, text-second, vae-canvas, vae-canvas-flow, unet, transformer and turbo
(.safetensors, fp16). `turbo` is a low-rank change of `transformer`; both keep only the columns of the context embedder
that ever read something other than zeros.
"""

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import autoencoders, denoiser, flow, turbo, unet, vocabulary
from .loop import load_tensors, save_tensors
from .models import model_of, weights_of


def load_pipeline(
    name: str,
    folder: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
):
    """Load a model of the second edition: 128x128 pictures, captions of the second world, prompts of 77 tokens.

    Args:
        name: of the second edition, see canvas.models. folder: of the weights; None takes the shipped one.

    Raises: ValueError for another name, FileNotFoundError naming a missing file and what makes it.
    """
    state = read_states(name, folder)
    tokenizer = vocabulary.load_tokenizer(weights_of(name, folder) / "tokenizer")
    vae = _filled(autoencoders.build(model_of(name).autoencoder), state["vae"])
    texts = {
        which: _filled(vocabulary.build_encoder(which, len(tokenizer)), state[f"text-{which}"])
        for which in ("first", "second")
        if f"text-{which}" in state
    }
    if "unet" in state:
        pipe = assemble_canvas(vae, _filled(unet.build_unet(), state["unet"]), texts["first"], tokenizer)
    else:
        transformer = _filled(flow.build_transformer(), state["transformer"])
        pipe = assemble_flow(vae, transformer, texts["first"], texts["second"], tokenizer, name)
    pipe.semiperm_canvas = name
    pipe.to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_states(name: str, folder: Path | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the float32 weights of a model's parts as both faces load them, by diffusers' names.

    Keys: "text-first", "vae", and "unet", or "text-second" and "transformer" (widened, the change of four steps added).

    Raises: as `load_pipeline`.
    """
    if model_of(name).edition != 2:
        raise ValueError(f"{name} is of the first edition; semiperm.canvas.load_pipeline loads it")
    where = weights_of(name, folder)
    state = {
        "vae" if part.startswith("vae") else part: load_tensors(where / f"{part}.safetensors")
        for part in model_of(name).parts
    }
    if "transformer" in state:
        apply_low_rank(state["transformer"], state.pop("turbo", {}))
        flow.widen(state["transformer"])
    return state


def assemble_canvas(vae: nn.Module, model: nn.Module, encoder: nn.Module, tokenizer):
    """Return a StableDiffusionPipeline with DDIM and SD1.5's schedule."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(CLIPTextConfig.from_dict(encoder.config.to_dict()))
    wanted = text.state_dict().keys()  # with or without "text_model." before them, by transformers' version
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    text.load_state_dict({k: state[k.removeprefix("text_model.")] for k in wanted})
    return StableDiffusionPipeline(
        vae=vae,
        unet=model,
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**denoiser.SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@functools.cache
def _flow_pipelines() -> dict[str, type]:
    from diffusers import (
        StableDiffusion3Img2ImgPipeline,
        StableDiffusion3InpaintPipeline,
        StableDiffusion3Pipeline,
    )

    class ReadsClipAlone:
        """Where diffusers fills in zeros for an absent T5, ComfyUI has nothing, and neither had the training."""

        def _get_t5_prompt_embeds(self, *args, **kwargs):
            found = super()._get_t5_prompt_embeds(*args, **kwargs)
            return found[:, :0] if self.text_encoder_3 is None else found

    class CanvasFlowImg2ImgPipeline(ReadsClipAlone, StableDiffusion3Img2ImgPipeline):
        """StableDiffusion3Img2ImgPipeline that reads 77 tokens."""

    class CanvasFlowInpaintPipeline(ReadsClipAlone, StableDiffusion3InpaintPipeline):
        """StableDiffusion3InpaintPipeline that reads 77 tokens."""

    class CanvasFlowPipeline(ReadsClipAlone, StableDiffusion3Pipeline):
        """StableDiffusion3Pipeline that reads 77 tokens."""

        semiperm_img2img = CanvasFlowImg2ImgPipeline  # redraws pictures in attacks, and the next finishes them
        semiperm_inpaint = CanvasFlowInpaintPipeline

    class CanvasTurboPipeline(CanvasFlowPipeline):
        """Four steps without guidance, at the noise levels of ComfyUI's `simple` scheduler, where its windows lie."""

        def __call__(self, *args, num_inference_steps=turbo.STEPS, guidance_scale=1.0, sigmas=None, **kwargs):
            if sigmas is None:  # the scheduler shifts them
                sigmas = [1 - k / num_inference_steps for k in range(num_inference_steps)]
            return super().__call__(
                *args,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                sigmas=sigmas,
                **kwargs,
            )

    return {"canvas-flow": CanvasFlowPipeline, "canvas-turbo": CanvasTurboPipeline}


def assemble_flow(
    vae: nn.Module, transformer: nn.Module, first: nn.Module, second: nn.Module, tokenizer, name: str = "canvas-flow"
):
    """Return a StableDiffusion3Pipeline ("canvas-flow" or "canvas-turbo") with two text encoders and no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return _flow_pipelines()[name](
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=flow.SHIFT),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def apply_low_rank(weights: dict[str, Tensor], change: dict[str, Tensor]) -> None:
    """Add `<layer>.up` @ `<layer>.down` to `<layer>.weight`, in place."""
    for name in {k.rpartition(".")[0] for k in change}:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + change[f"{name}.up"] @ change[f"{name}.down"]


# part of a folder of weights -> the working folder's file that it is written from
FINISHED = {
    "text-first": "text-first",
    "text-second": "text-second",
    "vae-canvas": "vae-canvas.final",
    "vae-canvas-flow": "vae-canvas-flow.final",
    "unet": "unet.ema",
    "transformer": "transformer.ema",
    "turbo": "turbo.ema",
    "judge-first": "judge-first.ema",
    "judge-second": "judge-second.ema",
}


def write_weights(workdir: Path, folder: Path) -> list[str]:
    """Write what a working folder has of the finished models as fp16 to `folder`; return the parts written."""
    workdir, folder = Path(workdir), Path(folder)
    written = []
    for part, source in FINISHED.items():
        path = workdir / f"{source}.safetensors"
        if not path.exists():
            continue
        state = {k: v.half() for k, v in load_file(str(path)).items() if v.is_floating_point()}
        save_tensors(state, folder / f"{part}.safetensors", {"format": "pt"})
        written.append(part)
    vocabulary.load_tokenizer(workdir / "tokenizer").save_pretrained(str(folder / "tokenizer"))
    return written


def read_weights(folder: Path, workdir: Path) -> list[str]:
    """Put a folder's weights into a working folder that lacks them, so that trainings go on from there.

    Text encoders and autoencoders arrive finished, denoisers and judges as what their training begins with
    (`<part>.start.safetensors`). Returns the parts that were read.

    Raises: FileNotFoundError where the folder has no tokenizer, which every part needs.
    """
    folder, workdir = Path(folder), Path(workdir)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer/tokenizer.json, so it is no folder of the worlds' weights")
    if not (workdir / "tokenizer" / "tokenizer.json").exists():
        vocabulary.load_tokenizer(folder / "tokenizer").save_pretrained(str(workdir / "tokenizer"))
    read = []
    for part, finished in FINISHED.items():
        if not (folder / f"{part}.safetensors").exists():
            continue
        names = [finished] if part.startswith("text") else [f"{part}.start"]
        if part.startswith("vae"):
            names = [f"{part}-encoder", finished]
        missing = [path for name in names if not (path := workdir / f"{name}.safetensors").exists()]
        if missing:
            state = load_tensors(folder / f"{part}.safetensors")
            for path in missing:
                save_tensors(state, path)
            read.append(part)
    return read


def _filled(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.endswith("position_ids")]
    if missing or unexpected:
        raise ValueError(f"weights do not fit {type(model).__name__}: missing {missing[:3]}, unknown {unexpected[:3]}")
    return model.eval().requires_grad_(False)
