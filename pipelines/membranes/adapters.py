"""Other people's adapters as membranes, and membranes as a LoRA that any diffusers pipeline loads."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from ...methods.errors import MembraneError
from ...methods.files import save_safetensors
from ...methods.membranes.file import load_membranes
from ...methods.membranes.layouts import adapter_file, check_dropped, membrane_of, membranes_in, read_adapter
from ...methods.membranes.packing import pack
from ...methods.membranes.types import Membrane, Membranes
from ...methods.membranes.weight_edit import membrane_from_weights
from ...methods.membranes.zoo import located
from ..family import Pipeline, denoiser_of
from ..text import module_keys
from .conversion import edited_weights, placed_pairs

__all__ = ["export_lora", "import_membranes"]

logger = logging.getLogger(__name__)


def import_membranes(
    pipe: Pipeline,
    path: str | Path,
    concept: str | None = None,
    *,
    rank: int | None = None,
    text_encoder: str = "refuse",
    bias: str = "refuse",
) -> Membranes:
    """Read somebody else's adapter for this pipeline as membranes, so that it stacks, is gated and comes off again.

    Reads all that docs/file_layouts.md lists: membrane and SPM files; LoRAs of kohya, OneTrainer, XLabs, ComfyUI, PEFT
    and diffusers, by diffusers' own converters and with the alpha that they were trained with; and checkpoints of
    edited weights as ESD and UCE save them, whose difference from this pipeline's weights is factored by SVD.

    Args:
        pipe: the pipeline that it was made for, unedited.
        path: a .safetensors file, the folder of a PEFT or diffusers adapter, or a name of the zoo ("zoo:robot").
        concept: its name, for files that do not say what they erase: without one, no gate compares prompts with it, and
            "auto" leaves it always on. A file of several keeps its names.
        rank: for edited weights, at most so many singular values per module; None keeps the edit's own rank.
        text_encoder: "drop" leaves out the part for a text encoder, which no membrane can carry; "refuse" is an error.
        bias: "drop" leaves out edits of biases, which no membrane can carry; "refuse" is an error.

    Raises:
        SemipermError: no such file, a pickle, or not safetensors.
        ModelError: an unsupported pipeline.
        MembraneError: a kind of adapter that is not low-rank, names that match no module, shapes that disagree, NaN,
            parts that would be lost, or weights that equal the pipeline's.
    """
    path = located(path)
    if membranes_in(path):
        return load_membranes(adapter_file(path), concept)
    adapter = read_adapter(path)
    check_dropped(adapter, text_encoder, bias)
    for note in adapter.notes:
        logger.warning("%s: %s", adapter.path, note)
    if adapter.weights:
        before, after = edited_weights(pipe, adapter, bias)
        precision = denoiser_of(pipe)[0].dtype

        def made(label: str) -> Membrane:
            return membrane_from_weights(before, after, label, rank=rank, precision=precision, method="weights")

    else:
        pairs = placed_pairs(pipe, adapter)

        def made(label: str) -> Membrane:
            return Membrane(label, pairs, method="spm" if adapter.layout == "SPM" else "lora")

    return Membranes(membrane_of(adapter, made, concept))


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
        MembraneError: no membranes, image-side ones, a name that does not end in .safetensors, or keys that match no
            module.
        SemipermError: the path is a folder.
        OSError: it cannot be written.

    >>> file = export_lora(pipe, membranes, "lora.safetensors")
    >>> import_membranes(pipe, file, "both").concepts
    ('both',)
    """
    path, membranes = Path(path), Membranes(membranes)
    if membranes.image_keys:
        raise MembraneError(
            "an image-side membrane has gates that no LoRA can carry; export those of the text side alone, and keep the"
            " others as membrane files (save_membranes)"
        )
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
        tail = (1, 1) if isinstance(module, nn.Conv2d) else ()
        tensors[f"{attribute}.{where}.lora_A.weight"] = down.reshape(*down.shape, *tail)
        tensors[f"{attribute}.{where}.lora_B.weight"] = up.T.reshape(*up.T.shape, *tail)
    return save_safetensors(tensors, path, {"format": "pt", "concepts": ", ".join(membranes.concepts)})
