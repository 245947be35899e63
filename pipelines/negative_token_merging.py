"""Negative token merging on diffusers pipelines of the SD1.x, SD2, SDXL, SD3, Flux and Wan families.

handle = apply_negative_token_merging(pipe, NegativeTokenMergingConfig(reference=image, reference_prompt="a quibble"))
picture = pipe("an eared mascot in striped style on sky").images[0]
handle.report()
remove_negative_token_merging(pipe)
"""

from __future__ import annotations

from torch import nn

from ..methods.errors import TokenMergingError
from ..methods.negative_token_merging import NegativeTokenMergingConfig
from .hooks import TOKEN_MERGING, install, uninstall
from .latents import pixels_per_latent
from .text import denoiser_of, family_of
from .token_merging_hooks import BeforeOutputHook, LayerHook, MergeState, RowsHook, told_context

__all__ = [
    "NegativeTokenMergingConfig",
    "TokenMergingHandle",
    "apply_negative_token_merging",
    "remove_negative_token_merging",
]


_ATTRIBUTE = "_semiperm_negative_token_merging"


def apply_negative_token_merging(pipe, config: NegativeTokenMergingConfig | None = None) -> TokenMergingHandle:
    """Push attention outputs away from reference images, or the images of a batch away from one another.

    In place of what was applied before; nothing changes if anything is wrong. Inside the window, one more row a
    reference image is denoised beside the batch (for each distinct prompt in it, unless `reference_prompt` is given);
    outside, none. That row never comes back as an image. Under torch.compile the row is carried at every step and
    takes the first image's prompt, since a compiled graph looks neither at the timestep's value nor at prompts.

    Args:
        pipe: SD1.x, SD2, SDXL, SD3, Flux or Wan pipeline, compiled or not.
        config: see `NegativeTokenMergingConfig`; None is diversity mode.

    Returns:
        A handle: `.report()` tells what was pushed in the last call, `.remove()` undoes; also a context manager.

    Raises:
        TokenMergingError: an unsupported pipeline, or no attention layer that `blocks` lets in.

    Source: NegToMe (arXiv 2412.01339), section 3; see methods/negative_token_merging.py for where we differ.
    """
    config = config or NegativeTokenMergingConfig()
    denoiser, _ = denoiser_of(pipe)
    family = family_of(pipe, wan=True, error=TokenMergingError)
    layers = _layers(denoiser, family, config)
    state = MergeState(pipe, family, config, [path for path, _, _ in layers])
    remove_negative_token_merging(pipe)
    handle = TokenMergingHandle(pipe, state, layers)
    handle.install()
    return handle


def remove_negative_token_merging(pipe) -> None:
    """Undo `apply_negative_token_merging`: the untouched model's bits again. Where nothing was applied: nothing."""
    handle = getattr(denoiser_of(pipe)[0], _ATTRIBUTE, None)
    if handle is not None:
        handle.remove()


class TokenMergingHandle:
    """Negative token merging at work on one pipeline; a context manager that removes it on exit."""

    def __init__(self, pipe, state: MergeState, layers: list):
        self.pipe, self.state, self.layers = pipe, state, layers
        self.denoiser, _ = denoiser_of(pipe)

    def __enter__(self) -> TokenMergingHandle:
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    @property
    def config(self) -> NegativeTokenMergingConfig:
        return self.state.config

    def install(self) -> None:
        """Put the hooks in place; `remove` takes them out again."""
        setattr(self.denoiser, _ATTRIBUTE, self)
        for path, module, before in self.layers:
            install(module, (BeforeOutputHook if before else LayerHook)(self.state, path), TOKEN_MERGING)
        install(self.denoiser, RowsHook(self.state, self.denoiser), TOKEN_MERGING)
        if hasattr(self.denoiser, "cache_context"):
            self.denoiser.cache_context = told_context(self.state, self.denoiser.cache_context)

    def remove(self) -> None:
        """Take every hook out. Removing twice is harmless."""
        if getattr(self.denoiser, _ATTRIBUTE, None) is not self:
            return
        for module in (self.denoiser, *(module for _, module, _ in self.layers)):
            uninstall(module, TOKEN_MERGING)
        delattr(self.denoiser, _ATTRIBUTE)
        self.denoiser.__dict__.pop("cache_context", None)

    def prepare(self, height: int, width: int) -> None:
        """Encode the reference for images of this size now; needed before a compiled model's first call only."""
        if self.config.mode == "reference":
            scale = pixels_per_latent(self.pipe)
            self.state.reference.prepare(height // scale, width // scale)

    def report(self) -> dict:
        """What was pushed in the last call of the pipeline.

        Returns:
            {"mode", "layers": how many are hooked, "rows": [{"kind", "image", "pushed": mean share of tokens}],
            "steps": [{"percent", "sigma", "active"}], "extra_rows": denoised beside the batch, over all steps}.

        Raises:
            TokenMergingError: the pipeline has not run since (or only compiled, which keeps no record).
        """
        record = self.state.record.report()
        if not record["steps"]:
            raise TokenMergingError(
                "no report yet: the pipeline has not been called since apply_negative_token_merging (a compiled"
                " denoiser keeps no record)"
            )
        return {"mode": self.config.mode, "layers": len(self.layers), **record}


def _layers(denoiser: nn.Module, family: str, config: NegativeTokenMergingConfig) -> list[tuple[str, nn.Module, bool]]:
    """(path, module to hook, whether its input is meant) of every attention layer that the config lets in."""
    names = {"attn", "attn1"} | ({"attn2"} if family == "sd3" else set())  # SD3.5's attn2 is self-attention
    if config.cross_attention and family in ("sd", "sdxl"):
        names.add("attn2")
    paths = {path: module for path, module in denoiser.named_modules() if path.rpartition(".")[2] in names}
    blocks = config.blocks or (("up_blocks",) if family in ("sd", "sdxl") else ("",))
    found = {path: module for path, module in paths.items() if path.startswith(blocks)}
    if not found:
        raise TokenMergingError(
            f"blocks={blocks} let in 0 of {len(paths)} attention layers of this {type(denoiser).__name__};"
            f" they are called e.g. {next(iter(paths), 'none')!r}"
        )
    layers = []
    for path, module in found.items():
        # the released Flux code matches before the output projection where there is one
        before = config.compat == "official" and family == "flux" and getattr(module, "to_out", None) is not None
        layers.append((path, module.to_out[0] if before else module, before))
    return layers
