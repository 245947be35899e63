"""Adapter files as people have them: which layout a file has, and what stands in it under the file's own names.

Nothing here knows a model. A LoRA's pairs come out with their true alpha, whoever wrote it down:

    kohya, SPM       <name>.alpha                                       scale = alpha / rank
    PEFT             adapter_config.json beside the file                scale = alpha / rank, or alpha / sqrt(rank)
    diffusers        "lora_adapter_metadata" in the file's own header   the same, one entry a component
    otherwise        nothing                                            scale = 1

`pipelines/membranes/conversion.py` brings the names to a pipeline's modules.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from ..errors import MembraneError
from ..files import read_safetensors
from .types import LowRank, Membrane

__all__ = [
    "AdapterFile",
    "adapter_file",
    "bare_name",
    "check_dropped",
    "membrane_of",
    "membranes_in",
    "read_adapter",
    "refuse_bias",
]

_CONFIG = "adapter_config.json"
_HEADER = "lora_adapter_metadata"  # diffusers' key for PEFT's configuration
_IN_FOLDERS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PART = re.compile(
    r"(?:\.lora_down|\.lora_A(?:\.default)?|\.lora\.down|(?<=_lora)\.down|(?<=_lora[12])\.down|\.lora_linear_layer\.down)"
    r"\.weight$"
)
_UP = re.compile(
    r"(?:\.lora_up|\.lora_B(?:\.default)?|\.lora\.up|(?<=_lora)\.up|(?<=_lora[12])\.up|\.lora_linear_layer\.up)\.weight$"
)
_ALPHA = re.compile(r"\.alpha$")
_BIAS = re.compile(r"\.lora_B(?:\.default)?\.bias$|\.diff_b$")
_TEXT_ENCODER = re.compile(
    r"^(?:base_model\.model\.)?(?:lora_te\d?_|lora_prior_te_|text_encoders?(?:_\d)?\.|text_model\.|cond_stage_model\.|"
    r"conditioner\.)"
)
_WHOLE = re.compile(r"^(?:first_stage_model|vae|model_ema)\.")
_PREFIX = re.compile(r"^(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|unet\.|transformer\.)")
_REFUSED = (  # a key that only such a file has -> what it is, and why it cannot become a membrane
    (r"\.hada_[wt]\d", "LoHa: a Hadamard product of two low-rank matrices is not low-rank"),
    (r"\.lokr_[wt]\d", "LoKr: a Kronecker product is not low-rank"),
    (r"\.dora_scale$|lora_magnitude_vector", "DoRA: it rescales the whole weight by column, which is not low-rank"),
    (r"\.lora_mid\.weight$", "LoCon: it adapts convolution kernels larger than 1x1"),
    (r"\.(?:b?oft_\w+|oft_blocks)", "OFT: it rotates the whole weight, which is not low-rank"),
    (r"\.on_input$|\.ia3_l", "(IA)^3: it rescales activations, which is not low-rank"),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding table: membranes wrap projections"),
    (r"\.(?:a1|b1)\.weight$", "GLoRA: it also multiplies the weight itself"),
    (r"^lora_controlnet$", "a Control LoRA: it is half of a ControlNet"),
    (r"\.(?:diff|w_norm|set_weight)$", "weights as differences (LyCORIS 'full', or norms): save them as a LoRA"),
    (r"^(?:emb_params|string_to_param|clip_[lg])$", "a textual inversion: it holds words, no weights"),
)
_CONTROL = re.compile(r"\.(?:query_norm|key_norm)\.scale$|\.norm_(?:added_)?[qk]\.weight$")
_ALTERED = ("pissa", "olora", "corda", "eva_svd")  # initialisations that also change the base weights
LAYOUTS = (  # the first pattern that any key fits
    (r"^lora_unet_(?:input_blocks|middle_block|output_blocks)_", "kohya LoRA, SGM names"),
    (r"^lora_unet_(?:double|single)_blocks_", "kohya LoRA, Flux names"),
    (r"^lora_unet_joint_blocks_", "kohya LoRA, original SD3 names"),
    (r"^lora_transformer_", "kohya LoRA, transformer names"),
    (r"^lora_unet_|^lora_te", "kohya LoRA"),
    (r"\.processor\.to_\w+_lora\.", "diffusers LoRA, attention processors"),
    (r"blocks\.\d+\.processor\.\w+_lora\d?\.", "XLabs LoRA"),
    (r"^base_model\.model\.", "PEFT LoRA"),
    (r"^diffusion_model\..*\.lora_", "ComfyUI LoRA"),
    (r"\.lora_A\.", "diffusers LoRA, PEFT names"),
    (r"\.lora_down\.|\.lora\.down\.|_lora\.down\.", "diffusers LoRA"),
    (r"(?:^|\.)(?:input_blocks|middle_block|output_blocks|double_blocks|single_blocks|joint_blocks)\.",
     "edited weights, original names"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """What stands in a file, under the file's own names.

    Args:
        path: the file.
        layout: which of the layouts, for people.
        metadata: its header.
        pairs: name -> low-rank pair, with its true alpha; {} for edited weights.
        weights: name -> tensor, for edited weights ("<path>.weight", "<path>.bias", ...); {} for LoRAs.
        biases: name -> what is added to a bias.
        text_encoder: names that belong to a text encoder: neither in pairs nor in weights.
        phrases: the concept and its synonyms as the file says them; () where it does not.
        notes: what a reader should know, one sentence each.
    """

    path: Path
    layout: str
    metadata: dict[str, str]
    pairs: dict[str, LowRank] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    text_encoder: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def bare_name(name: str) -> str:
    """A dotted name without the prefixes that say which part of a pipeline it is in."""
    while (found := _PREFIX.match(name)) is not None:
        name = name[found.end() :]
    return name


def adapter_file(path: str | Path) -> Path:
    """The safetensors file that a path stands for: itself, or the adapter in a folder of PEFT or diffusers.

    Raises:
        MembraneError: a folder without an adapter, or with several.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    named = [path / name for name in _IN_FOLDERS if path / name in files]
    if not named and len(files) != 1:
        raise MembraneError(
            f"{str(path)!r} holds {len(files)} safetensors files and none of {', '.join(_IN_FOLDERS)}; expected an"
            " adapter's folder: give the file itself"
        )
    return named[0] if named else files[0]


def membranes_in(path: str | Path) -> bool:
    """Whether a file is one of `save_membranes`, which names its membranes itself."""
    return "semiperm" in read_safetensors(adapter_file(path))[1]


def read_adapter(path: str | Path) -> AdapterFile:
    """Read somebody else's adapter, or edited weights, under the names of its file.

    Args:
        path: a .safetensors file, or a folder with one (PEFT's, diffusers').

    Raises:
        SemipermError: no readable safetensors file, a pickle, a kind of adapter that cannot become membranes, pairs
            that are incomplete or do not fit together, NaN.
    """
    path = adapter_file(path)
    tensors, metadata = read_safetensors(path)
    if not tensors:
        raise MembraneError(f"{str(path)!r} holds no tensors; expected an adapter")
    for pattern, reason in _REFUSED:
        if (key := next((key for key in tensors if re.search(pattern, key)), None)) is not None:
            raise MembraneError(f"{str(path)!r} is {_article(reason)} ({key}); expected a plain LoRA")
    text = tuple(key for key in tensors if _TEXT_ENCODER.match(key))
    ours = {key: tensor for key, tensor in tensors.items() if key not in set(text)}
    says = {
        "path": path,
        "metadata": metadata,
        "text_encoder": tuple(dict.fromkeys(_module(key) for key in text)),
        "phrases": _phrases(metadata),
    }
    layout = next((name for pattern, name in LAYOUTS if any(re.search(pattern, key) for key in tensors)), None)
    if not any(_PART.search(key) or _UP.search(key) for key in tensors):
        return AdapterFile(**says, **_edited(ours, layout, path))
    if (key := next((key for key in tensors if _CONTROL.search(key)), None)) is not None:
        raise MembraneError(f"{str(path)!r} is a Flux Control LoRA ({key}): it replaces norms; expected a plain LoRA")
    config, notes = _config(path, metadata, layout)
    biases = {_BIAS.sub("", key): tensor for key, tensor in ours.items() if _BIAS.search(key) and tensor.any()}
    pairs = {}
    for name, parts in _grouped(ours, path).items():
        try:
            pairs[name] = _pair(parts, _settings(config, name), bare_name(name))
        except MembraneError as error:
            raise MembraneError(f"{str(path)!r}: {name}: {error}") from None
    spm = "prompts" in metadata and layout == "kohya LoRA"
    return AdapterFile(layout="SPM" if spm else layout or "LoRA", pairs=pairs, biases=biases, notes=notes, **says)


def membrane_of(adapter: AdapterFile, membrane: Callable[[str], Membrane], concept: str | None) -> Membrane:
    """`membrane(label)` with the name that the user or the file gives it, or with none but its file's."""
    said = adapter.phrases
    if concept is not None:
        made = membrane(concept)
        return replace(made, concept=concept, phrases=(concept, *(p for p in said[1:] if p != concept)), named=True)
    if said:
        return replace(membrane(said[0]), concept=said[0], phrases=said, named=True)
    label = adapter.path.parent.name if adapter.path.name in _IN_FOLDERS else adapter.path.stem
    label = label.removesuffix("_last") or adapter.path.stem  # SPM's training names its files so
    return replace(membrane(label), concept=label, phrases=(), named=False)


def check_dropped(adapter: AdapterFile, text_encoder: str, bias: str) -> None:
    """Refuse what membranes cannot carry, unless the user said that it is to be left out.

    Args:
        text_encoder, bias: "refuse" or "drop".

    Raises:
        MembraneError: an unknown choice, a part of the file that would be lost, or nothing that is left.
    """
    for name, value in (("text_encoder", text_encoder), ("bias", bias)):
        if value not in ("refuse", "drop"):
            raise MembraneError(f"{name}={value!r}; expected 'refuse' or 'drop'")
    if adapter.text_encoder and text_encoder != "drop":
        raise MembraneError(
            f"{str(adapter.path)!r} also adapts a text encoder ({len(adapter.text_encoder)} modules, such as"
            f" {adapter.text_encoder[0]}); membranes act on the denoiser alone: give text_encoder='drop'"
            " (--text-encoder drop) to leave that part out, or load the whole file with pipe.load_lora_weights"
        )
    if adapter.text_encoder and not adapter.pairs and not adapter.weights:
        raise MembraneError(f"{str(adapter.path)!r} adapts a text encoder alone; nothing is left for the denoiser")
    for name, added in adapter.biases.items():
        refuse_bias(adapter, f"the bias of {name}", f"by up to {float(added.abs().max()):.2g}", bias)


def refuse_bias(adapter: AdapterFile, what: str, size: str, bias: str) -> None:
    """Raise a MembraneError about an edited bias, unless bias is "drop"."""
    if bias != "drop":
        raise MembraneError(
            f"{str(adapter.path)!r} also edits {what} ({size}); a membrane adds what a projection's input asks for, and"
            " a bias has no input: give bias='drop' (--bias drop) to leave such edits out, or load the file as the"
            " model"
        )


def _article(reason: str) -> str:
    kind, colon, why = reason.partition(":")
    named = kind if kind.startswith(("a ", "weights")) else f"a {kind} file"
    return f"{named}{colon}{why}"


def _module(key: str) -> str:
    for pattern in (_PART, _UP, _ALPHA):
        key = pattern.sub("", key)
    return key


def _phrases(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """SPM's "prompts", or the "concepts" of our own `export_lora`."""
    said = metadata.get("prompts") or metadata.get("concepts") or ""
    return tuple(phrase.strip() for phrase in said.split(",") if phrase.strip())


def _edited(tensors: dict[str, Tensor], layout: str | None, path: Path) -> dict:
    if (key := next((key for key in tensors if _WHOLE.match(key)), None)) is not None:
        raise MembraneError(
            f"{str(path)!r} is a whole checkpoint ({key}); expected an adapter, or the edited denoiser alone: load it"
            " as the model instead"
        )
    broken = [key for key, tensor in tensors.items() if not tensor.is_floating_point() or not tensor.isfinite().all()]
    if broken:
        raise MembraneError(f"{str(path)!r}: {broken[0]} holds NaN, Inf or integers; expected edited weights")
    return {"layout": layout or "edited weights, diffusers names", "weights": tensors}


def _grouped(tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    alphas = {_ALPHA.sub("", key): tensor for key, tensor in tensors.items() if _ALPHA.search(key)}
    for key, tensor in tensors.items():
        for part, pattern in (("down", _PART), ("up", _UP)):
            if pattern.search(key):
                found.setdefault(pattern.sub("", key), {})[part] = tensor
                break
        else:
            if not _ALPHA.search(key) and not _BIAS.search(key):
                raise MembraneError(
                    f"{str(path)!r}: {key} is no part of a LoRA; expected names that end in .lora_down.weight,"
                    " .lora_up.weight, .alpha, .lora_A.weight, .lora_B.weight, .lora.down.weight or .lora.up.weight"
                )
    for name, parts in found.items():
        if len(parts) < 2:
            raise MembraneError(
                f"{str(path)!r}: {name} has only its {next(iter(parts))} part; the file is incomplete, get it again"
            )
        if name in alphas:
            parts["alpha"] = alphas[name]
    if lost := [name for name in alphas if name not in found]:
        raise MembraneError(f"{str(path)!r}: {lost[0]} has an alpha and no pair; the file is incomplete, get it again")
    return found


def _pair(parts: dict[str, Tensor], settings: Mapping, where: str) -> LowRank:
    down, up, alpha = parts["down"], parts["up"], parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise MembraneError(f"its alpha has shape {tuple(alpha.shape)}; expected a scalar")
    if down.ndim == 4 and (tuple(down.shape[2:]) != (1, 1) or tuple(up.shape[2:]) != (1, 1)):
        raise MembraneError(
            f"adapts a {down.shape[2]}x{down.shape[3]} convolution (LoCon); membranes wrap linear layers and 1x1"
            " convolutions: export the adapter without convolutions"
        )
    rank = down.shape[0]
    if alpha is not None:
        return LowRank(down, up, float(alpha))
    if not settings:
        return LowRank(down, up, float(rank))
    value = _by_pattern(settings.get("alpha_pattern") or {}, where, settings.get("lora_alpha", rank))
    return LowRank(down, up, float(value) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0))


def _by_pattern(patterns: Mapping[str, float], where: str, default: float) -> float:
    """PEFT's own rule: the first key that is the end of the module's path, as a regular expression."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", where)), default)


# ---- what PEFT and diffusers write down beside the tensors ---------------------------------------------------------


def _config(path: Path, metadata: Mapping[str, str], layout: str | None) -> tuple[dict, tuple[str, ...]]:
    """({component or "": settings}, notes)."""
    beside = path.with_name(_CONFIG)
    alone = path.name in _IN_FOLDERS or len(list(path.parent.glob("*.safetensors"))) == 1
    if beside.is_file() and alone:
        config = {"": _json(beside.read_text(encoding="utf-8"), beside)}
    elif _HEADER in metadata:
        config = {}
        for key, value in _json(metadata[_HEADER], path).items():
            component, dot, name = key.partition(".")
            config.setdefault(component if dot else "", {})[name if dot else key] = value
    else:
        unsaid = layout == "PEFT LoRA"
        note = f"no {_CONFIG} beside it: alpha is taken to be the rank (scale 1)"
        return {}, (note,) if unsaid else ()
    for component, settings in config.items():
        if not component.startswith("text_encoder"):
            _check_settings(settings, path)
    return config, ()


def _json(text: str, path: Path) -> dict:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise MembraneError(f"{str(path)!r}: the adapter's configuration is no JSON ({error}); get it again") from None
    if not isinstance(found, dict):
        raise MembraneError(f"{str(path)!r}: the adapter's configuration is a {type(found).__name__}; expected {{...}}")
    return found


def _check_settings(settings: Mapping, path: Path) -> None:
    kind = str(settings.get("peft_type") or "LORA").upper()
    start = str(settings.get("init_lora_weights", "")).lower()
    if kind != "LORA" or settings.get("use_dora"):
        kind = "DoRA" if settings.get("use_dora") else kind
        raise MembraneError(
            f"{str(path)!r} is a {kind} adapter by its configuration; only plain LoRA is low-rank: convert it first"
        )
    if start.startswith(_ALTERED):
        raise MembraneError(
            f"{str(path)!r} was initialised by {start!r}, which also changes the base weights; save it as a plain LoRA:"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _settings(config: Mapping[str, Mapping], name: str) -> Mapping:
    component = name.partition(".")[0]
    return config.get(component) or config.get("") or {}
