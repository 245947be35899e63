"""The names of an adapter file, brought to a pipeline's modules by diffusers' own converters.

A name that is a module's own (diffusers' path, or kohya's spelling of it) is taken as it is. All others go through what
`pipe.load_lora_weights` and `from_single_file` go through: nothing of that is copied here.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ...methods.errors import MembraneError, ModelError
from ...methods.membranes.layouts import AdapterFile, bare_name, refuse_bias
from ...methods.membranes.types import LowRank
from ..family import denoiser_of
from ..text import module_keys
from ..weights import weights_of

__all__ = ["edited_weights", "placed_pairs"]

_ORIGINAL = re.compile(r"(?:^|\.)(?:input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d")
_LDM = "model.diffusion_model."  # the prefix that diffusers' converter of whole checkpoints looks for
# what diffusers' converters raise where they do not know a name; they assert, too
_UNKNOWN = (ValueError, KeyError, IndexError, AttributeError, NotImplementedError, AssertionError, RuntimeError)


def placed_pairs(pipe, adapter: AdapterFile) -> dict[str, LowRank]:
    """The pairs of a LoRA by module key.

    Raises:
        MembraneError: a name that no converter of this pipeline knows, or that leads to no module.
    """
    denoiser, attribute = denoiser_of(pipe)
    paths = {path: key for key, (path, _) in module_keys(denoiser, attribute).items()}
    keys, placed, foreign = set(paths.values()), {}, {}
    for name, pair in adapter.pairs.items():
        key = name if name in keys else paths.get(_diffusers_name(bare_name(name)))
        if key is None:
            foreign[name] = pair
        else:
            placed[key] = pair
    if foreign:
        for path, pair in _converted(pipe, foreign, adapter).items():
            if path not in paths:
                raise _no_module(adapter, next(iter(foreign)), denoiser, next(iter(paths)))
            if not _same(placed.setdefault(paths[path], pair), pair):
                raise MembraneError(
                    f"{str(adapter.path)!r} adapts {path} twice, under two names and differently; expected one pair for"
                    " each module: save it again with the tool that made it"
                )
    return placed


def _same(first: LowRank, second: LowRank) -> bool:
    if first is second:
        return True
    one, two = (pair.up.flatten(1).float() @ pair.down.flatten(1).float() * pair.scale for pair in (first, second))
    return torch.allclose(one, two, rtol=1e-4, atol=1e-6)


def _diffusers_name(name: str) -> str:
    """Old spellings of a module's path, by diffusers' table."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    (found,) = convert_unet_state_dict_to_peft({f"{name}.down.weight": None})
    return found.partition(".lora_A")[0].removesuffix(".down.weight")


def _converted(pipe, pairs: dict[str, LowRank], adapter: AdapterFile) -> dict[str, LowRank]:
    """diffusers path -> pair, by the pipeline's own `lora_state_dict`."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    denoiser, attribute = denoiser_of(pipe)
    tensors = {}
    for name, pair in pairs.items():
        # kohya's spelling, which is the one that every converter reads; XLabs' has a converter of its own
        own = ".processor." in name or name.startswith("lora_")
        spelt = name if own else f"lora_unet_{bare_name(name).replace('.', '_')}"
        down, up = (".down.weight", ".up.weight") if ".processor." in name else (".lora_down.weight", ".lora_up.weight")
        # the scale goes into `up`: some converters lose an alpha
        scaled = pair.up if pair.scale == 1 else pair.up.float() * pair.scale
        tensors |= {spelt + down: pair.down, spelt + up: scaled}
    options = {"unet_config": denoiser.config} if attribute == "unet" else {}
    try:
        found = type(pipe).lora_state_dict(tensors, **options)
    except _UNKNOWN as error:
        raise MembraneError(
            f"{str(adapter.path)!r}: diffusers' converter for {type(pipe).__name__} does not read {next(iter(pairs))!r}"
            f" ({type(error).__name__}: {str(error).strip()[:160]}); it belongs to another architecture, or must be"
            " converted first"
        ) from None
    found = convert_unet_state_dict_to_peft(found[0] if isinstance(found, tuple) else found)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in found.items():
        path, _, which = bare_name(key).rpartition(".lora_")
        parts.setdefault(path, {})[which] = tensor
    if any(set(both) != {"A.weight", "B.weight"} for both in parts.values()) or len(parts) < len(pairs):
        raise _no_module(adapter, next(iter(pairs)), denoiser, next(iter(module_keys(denoiser, attribute).values()))[0])
    return {
        path: LowRank(both["A.weight"], both["B.weight"], float(both["A.weight"].shape[0]))
        for path, both in parts.items()
    }


def edited_weights(pipe, adapter: AdapterFile, bias: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """({module key: weight before}, {module key: weight after}) of a checkpoint of edited weights.

    What equals the pipeline's, as far as the file's precision can tell, is no edit.

    Args:
        bias: "drop" leaves edits of biases out.

    Raises:
        MembraneError: names that are no parameter of the denoiser, other shapes, or edits of what is no projection.
        ModelError: weights that cannot be seen, see `pipelines.weights`.
    """
    denoiser, attribute = denoiser_of(pipe)
    modules = {path: (key, module) for key, (path, module) in module_keys(denoiser, attribute).items()}
    state = denoiser.state_dict()
    before, after = {}, {}
    for name, edited in _diffusers_names(denoiser, adapter).items():
        where, _, leaf = name.rpartition(".")
        if leaf == "weight" and where in modules:
            mine = weights_of(pipe, {where: modules[where][1]})[where]
        elif name in state:
            mine = state[name]
        else:
            raise _no_module(adapter, name, denoiser, next(iter(modules)))
        if mine.is_meta:
            raise ModelError(
                f"{name} of this {type(denoiser).__name__} is on the meta device (offloaded), so that"
                f" {str(adapter.path)!r} cannot be held against it; import it before offloading"
            )
        if mine.shape != edited.shape:
            raise MembraneError(
                f"{str(adapter.path)!r}: {name} is {tuple(edited.shape)}, this {type(denoiser).__name__} has"
                f" {tuple(mine.shape)}; wrong base model?"
            )
        # a checkpoint saved in half precision differs from a float32 base by rounding alone: compare what both hold
        own, mine, edited = mine.dtype, mine.detach().to(edited.dtype), edited.to(mine.device)
        if torch.equal(mine, edited) or torch.equal(mine, edited.to(own).to(edited.dtype)):
            continue
        if leaf == "bias" and where in modules:
            moved = float((edited - mine).float().norm() / mine.float().norm().clamp_min(1e-12))
            refuse_bias(adapter, name, f"by {moved:.1%} of its norm", bias)
            continue
        if leaf != "weight" or where not in modules:
            raise MembraneError(
                f"{str(adapter.path)!r} edits {name}, which belongs to no projection; membranes carry edits of linear"
                " layers and 1x1 convolutions: load it as the model instead"
            )
        _check_kernel(adapter, where, modules[where][1])
        before[modules[where][0]], after[modules[where][0]] = mine.float(), edited
    return before, after


def _check_kernel(adapter: AdapterFile, where: str, module: nn.Module) -> None:
    if any(side > 1 for side in module.weight.shape[2:]):
        raise MembraneError(
            f"{str(adapter.path)!r} edits the {'x'.join(map(str, module.weight.shape[2:]))} convolution {where};"
            " membranes carry edits of linear layers and 1x1 convolutions: load it as the model instead"
        )


def _diffusers_names(denoiser: nn.Module, adapter: AdapterFile) -> dict[str, Tensor]:
    if not any(_ORIGINAL.search(name) for name in adapter.weights):
        return {bare_name(name): tensor for name, tensor in adapter.weights.items()}
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = dict(denoiser.config)
    rows = {name: len(config.get(name) or ()) for name in ("down_block_types", "up_block_types")}
    if not all(rows.values()):
        raise _no_module(adapter, next(iter(adapter.weights)), denoiser, next(iter(denoiser.state_dict())))
    # the converter counts the blocks that it sees and wants the embeddings: stand-ins, for a checkpoint of a few layers
    layers = config["layers_per_block"] + 1
    stand_ins = [f"input_blocks.{i}.0.stand_in" for i in range(rows["down_block_types"] * layers)]
    stand_ins += [f"output_blocks.{i}.0.stand_in" for i in range(rows["up_block_types"] * layers)]
    stand_ins += [f"middle_block.{i}.stand_in" for i in range(3)]
    stand_ins += [f"label_emb.0.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")]
    checkpoint = dict.fromkeys(_LDM + name for name in stand_ins)
    checkpoint |= {_LDM + bare_name(name): tensor for name, tensor in adapter.weights.items()}
    found = convert_ldm_unet_checkpoint(checkpoint, config)
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    if len(found) < len(adapter.weights):
        raise _no_module(adapter, next(iter(adapter.weights)), denoiser, next(iter(denoiser.state_dict())))
    return found


def _no_module(adapter: AdapterFile, name: str, denoiser: nn.Module, example: str) -> MembraneError:
    return MembraneError(
        f"{str(adapter.path)!r} ({adapter.layout}): {name} matches no module of this {type(denoiser).__name__} (it has"
        f" e.g. {example!r}); it belongs to another base model, or to a layout that diffusers does not convert"
    )
