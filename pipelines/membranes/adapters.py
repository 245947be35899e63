"""Other people's adapters as membranes, and membranes as a LoRA that any diffusers pipeline loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...methods.errors import MembraneError
from ...methods.files import read_safetensors, save_safetensors
from ...methods.membranes.file import load_membranes
from ...methods.membranes.packing import pack
from ...methods.membranes.types import LowRank, Membrane, Membranes
from ...methods.membranes.weight_edit import membrane_from_weights
from ..family import Pipeline, denoiser_of
from ..text import module_keys

_LORA_PARTS = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "alpha": "alpha",
}


def import_membranes(
    pipe: Pipeline, path: str | Path, concept: str | None = None, *, rank: int | None = None
) -> Membranes:
    """Read somebody else's adapter for this pipeline as membranes, so that it stacks, is gated and comes off again.

    Understands membrane, SPM and kohya files; diffusers and PEFT LoRA files ("unet.<path>.lora_A.weight", "<path>.lora.
    down.weight", ...); and partial checkpoints of edited weights as ESD and UCE save them ("<path>.weight"), whose
    difference from this pipeline's weights is factored by SVD.

    Args:
        pipe: the pipeline that it was made for, unedited.
        path: a .safetensors file.
        concept: its name; None is the file's own, else its stem. A file of several keeps its names.
        rank: for partial checkpoints, at most so many singular values per module; None keeps every one above rounding.

    Raises:
        SemipermError: no such file, a pickle, or not safetensors.
        ModelError: an unsupported pipeline.
        MembraneError: unknown keys, keys that match no module, shapes that disagree, NaN, or weights that equal the
            pipeline's.
    """
    path = Path(path)
    tensors = _read(path)
    denoiser, attribute = denoiser_of(pipe)
    if all(key.startswith("lora_") for key in tensors):
        loaded = load_membranes(path)
        return loaded if concept is None or len(loaded) > 1 else Membranes(_renamed(loaded[0], concept))
    keys = {where: key for key, (where, _) in module_keys(denoiser, attribute).items()}
    weights = {key: module.weight for key, (_, module) in module_keys(denoiser, attribute).items()}
    name = concept or path.stem
    if any(_split_part(key)[1] in ("down", "up") for key in tensors):
        return Membranes(Membrane(name, _lora_pairs(tensors, keys, attribute, path), method="lora"))
    edited = {}
    for key, tensor in tensors.items():
        where, dot, leaf = _bare(key, attribute).rpartition(".")
        if leaf == "bias":
            raise MembraneError(
                f"{path}: {key} edits a bias, which a membrane cannot carry; expected '<path>.weight' only"
            )
        if not dot or leaf != "weight" or where not in keys:
            raise MembraneError(
                f"{path}: {key} matches no module of this {type(denoiser).__name__} (it has e.g."
                f" '{next(iter(keys))}.weight'); expected a LoRA, or edited weights under diffusers' own names"
            )
        edited[keys[where]] = tensor.to(weights[keys[where]].device)
    before = {key: weights[key].detach() for key in edited if key in weights}
    # a checkpoint saved in half precision differs from a float32 base by rounding alone: compare what both can hold
    before = {key: w.to(edited[key].dtype).to(torch.float32) for key, w in before.items()}
    return Membranes(membrane_from_weights(before, edited, name, rank=rank, method="weights"))


def export_lora(pipe: Pipeline, membranes: Membrane | Iterable[Membrane], path: str | Path) -> Path:
    """Write the ungated sum of membranes as a plain LoRA that `pipe.load_lora_weights` accepts, for every family.

    Keys are PEFT's ("unet.<path>.lora_A.weight", "transformer..."); scales and K membranes are folded into one pair per
    module, of rank R: y = W x + U^T (D x).

    Args:
        pipe: the pipeline they were made for; it tells the modules' names.
        membranes: one or more.
        path: ends in .safetensors; missing folders are made.

    Returns:
        The path.

    Raises:
        ModelError: an unsupported pipeline.
        MembraneError: no membranes, a name that does not end in .safetensors, or keys that match no module.
        SemipermError: the path is a folder.
        OSError: it cannot be written.

    >>> file = export_lora(pipe, membranes, "lora.safetensors")
    >>> import_membranes(pipe, file, "both").concepts
    ('both',)
    """
    path, membranes = Path(path), Membranes(membranes)
    if path.suffix != ".safetensors" or not membranes:
        raise MembraneError(
            f"cannot export {len(membranes)} membranes to {str(path)!r}; expected at least one, and a name ending in"
            " .safetensors"
        )
    denoiser, attribute = denoiser_of(pipe)
    modules = module_keys(denoiser, attribute)
    tensors = {}
    for key in membranes.module_keys:
        if key not in modules:
            raise MembraneError(f"{key} matches no module of this {type(denoiser).__name__}; wrong pipeline?")
        where, module = modules[key]
        down, up, _ = pack(membranes, key)
        tail = (1, 1) if module.weight.ndim == 4 else ()
        tensors[f"{attribute}.{where}.lora_A.weight"] = down.reshape(*down.shape, *tail)
        tensors[f"{attribute}.{where}.lora_B.weight"] = up.T.reshape(*up.T.shape, *tail)
    return save_safetensors(tensors, path, {"format": "pt", "concepts": ", ".join(membranes.concepts)})


def _read(path: Path) -> dict[str, Tensor]:
    tensors, _ = read_safetensors(path)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken or not tensors:
        raise MembraneError(f"{str(path)!r}: {f'{broken[0]} holds NaN or Inf' if broken else 'no tensors'}")
    return tensors


def _bare(key: str, attribute: str) -> str:
    return key.removeprefix(f"{attribute}.").removeprefix("base_model.model.").removeprefix("diffusion_model.")


def _split_part(key: str) -> tuple[str, str | None]:
    for suffix, part in _LORA_PARTS.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}"), part
    return key, None


def _lora_pairs(tensors: dict[str, Tensor], keys: dict[str, str], attribute: str, path: Path) -> dict[str, LowRank]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        where, part = _split_part(key)
        where = _bare(where, attribute).replace(".processor.", ".").replace("_lora", "")
        where = where if where in keys else where.replace(".to_out", ".to_out.0")
        if part is None or where not in keys:
            raise MembraneError(
                f"{path}: {key} matches no projection of this pipeline's {attribute} (it has e.g."
                f" {next(iter(keys))!r}); it belongs to another base model, or adapts a text encoder"
            )
        found.setdefault(keys[where], {})[part] = tensor
    pairs = {}
    for key, parts in found.items():
        if not {"down", "up"} <= set(parts):
            raise MembraneError(f"{path}: {key} has only {sorted(parts)}; the file is incomplete")
        alpha = float(parts["alpha"]) if "alpha" in parts else float(parts["down"].shape[0])
        pairs[key] = LowRank(parts["down"], parts["up"], alpha)
    return pairs


def _renamed(membrane: Membrane, concept: str) -> Membrane:
    phrases = (concept, *(phrase for phrase in membrane.phrases if phrase != membrane.concept))
    return replace(membrane, concept=concept, phrases=phrases)
