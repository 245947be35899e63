"""Membrane files: safetensors in SPM's (kohya's) key pattern, with metadata that says what is inside.

    <module key>.lora_down.weight  (R, in)     rank rows of consecutive membranes
    <module key>.lora_up.weight    (out, R)    their columns
    <module key>.alpha             ()          scale = alpha / R, so that plain LoRA loaders get the ungated sum

Image-side membranes add tensors of their own (visual_file.py), and raise the format version to 2.

The metadata entry "semiperm" (JSON) names each membrane and its share of the rows. Without it a file is one membrane:
SPM's published files (metadata "prompts", "rank", "alpha", or none) and kohya LoRAs of any rank load as they are; all
other layouts need the pipeline that tells the modules' names (`import_membranes`).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MembraneError
from ..files import read_safetensors, save_safetensors
from .layouts import AdapterFile, check_dropped, membrane_of, read_adapter
from .types import GateProbe, LowRank, Membrane, Membranes
from .visual import VisualSide
from .visual_file import PREFIX, described_side, side_of, side_tensors
from .zoo import located

FORMAT_VERSION = 2  # 1 where no membrane has an image side: what older versions read stays readable to them
_PARTS = (".lora_down.weight", ".lora_up.weight", ".alpha")
_Kind = tuple[int, float, str, str]  # of a low-rank pair: rank, alpha, dtype of down, dtype of up
_OURS = ("format", "format_version", "semiperm", "prompts", "rank", "alpha")


def load_membranes(
    paths: str | Path | Iterable[str | Path],
    concept: str | None = None,
    *,
    text_encoder: str = "refuse",
    bias: str = "refuse",
) -> Membranes:
    """Read membranes from one safetensors file, or from several in order; one file may hold several membranes.

    Args:
        paths: membrane files, SPM's published ones, or kohya LoRAs; `import_membranes` reads others, too. "zoo:robot"
            is one that comes with the package (`semiperm zoo list`).
        concept: the name of a file that holds one membrane; None is what the file says. Where nobody says, the membrane
            is not `named`, and no gate compares prompts with it. Files of several keep theirs.
        text_encoder, bias: "drop" leaves out what a LoRA has for a text encoder, or adds to biases.

    Raises:
        SemipermError: no such file, a pickle, or not safetensors.
        MembraneError: unknown keys, incomplete or mismatched pairs, NaN or Inf, a newer format. Each message names the
            file.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    found = [membrane for path in paths for membrane in _load_file(Path(located(path)), concept, text_encoder, bias)]
    return Membranes(found)


def save_membranes(membranes: Membrane | Iterable[Membrane], path: str | Path) -> Path:
    """Write membranes to one safetensors file, which `load_membranes` reads back bit for bit.

    The file appears whole or not at all. Without image-side membranes it is a valid kohya LoRA.

    Args:
        membranes: one or more.
        path: ends in .safetensors; missing folders are made.

    Returns:
        The path.

    Raises:
        MembraneError: no membranes, a name that does not end in .safetensors, or pairs that cannot share a file:
            different shapes on one module, or scales alpha / rank whose folding would lose bits.
        SemipermError: the path is a folder.
        OSError: it cannot be written.

    >>> pair = LowRank(down=torch.zeros(1, 8), up=torch.ones(4, 1), alpha=1.0)
    >>> path = save_membranes(Membrane("robot", {"lora_unet_to_k": pair}), "robot.safetensors")
    >>> load_membranes(path)
    Membranes(robot [spm, 1 modules])
    """
    path, membranes = Path(path), Membranes(membranes)
    if path.suffix != ".safetensors":
        raise MembraneError(f"cannot save to {str(path)!r}; expected a name ending in .safetensors")
    if not membranes:
        raise MembraneError(f"no membranes to save to {str(path)!r}; expected at least one")
    tensors: dict[str, Tensor] = {}
    for key in membranes.module_keys:
        tensors |= _stack(key, [m.modules[key] for m in membranes if key in m.modules])
    for number, membrane in enumerate(membranes):
        if membrane.visual is not None:
            tensors |= side_tensors(number, membrane.visual)
    return save_safetensors(tensors, path, _metadata(membranes))


# ---- writing -------------------------------------------------------------------------------------------------------


def _shared_scale(scales: list[float]) -> float | None:
    """The scale that all pairs of a module have in common; None means that each is folded into its own columns."""
    return scales[0] if all(math.isclose(scale, scales[0], rel_tol=1e-6) for scale in scales) else None


def _stack(key: str, pairs: list[LowRank]) -> dict[str, Tensor]:
    if len({(p.in_features, p.out_features, p.is_conv) for p in pairs}) > 1:
        shapes = [(tuple(p.down.shape), tuple(p.up.shape)) for p in pairs]
        raise MembraneError(f"{key}: pairs of shapes {shapes} cannot share a file; save one file each")
    scale = _shared_scale([p.scale for p in pairs])
    ups = [p.up for p in pairs]
    if scale is None:
        scale, ups = 1.0, [p.up * p.scale for p in pairs]
        if not all(torch.equal(up / p.scale if p.scale else up, p.up) for up, p in zip(ups, pairs, strict=True)):
            raise MembraneError(
                f"{key}: scales {[p.scale for p in pairs]} cannot be folded into one file without"
                " losing bits; save one file each"
            )
    downs, ups = _promoted([p.down for p in pairs]), _promoted(ups)
    rank = sum(p.rank for p in pairs)
    tensors = (torch.cat(downs), torch.cat(ups, dim=1), torch.tensor(scale * rank))
    return {key + part: t for part, t in zip(_PARTS, tensors, strict=True)}


def _promoted(tensors: list[Tensor]) -> list[Tensor]:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _metadata(membranes: Membranes) -> dict[str, str]:
    keys = {key: index for index, key in enumerate(membranes.module_keys)}
    described = {"modules": list(keys), "membranes": [_describe(m, keys) for m in membranes]}
    ranks = {pair.rank for m in membranes for pair in m.modules.values()} or {0}
    return {
        **(membranes[0].metadata if len(membranes) == 1 else {}),  # kept where other tools look for it
        "format": "semiperm-membrane",
        "format_version": str(FORMAT_VERSION if membranes.image_keys else 1),
        "prompts": ",".join(membranes.concepts),  # SPM's own reader wants these three
        "rank": str(max(ranks)),
        "alpha": str(float(max(ranks))),
        "semiperm": json.dumps(described, ensure_ascii=False),
    }


def _describe(membrane: Membrane, keys: dict[str, int]) -> dict:
    groups: dict[tuple, list[int]] = {}
    for key, pair in membrane.modules.items():
        kind = (pair.rank, float(pair.alpha), _dtype_name(pair.down), _dtype_name(pair.up))
        groups.setdefault(kind, []).append(keys[key])
    described: dict[str, object] = {
        "concept": membrane.concept,
        "phrases": membrane.phrases,
        "surrogate": membrane.surrogate,
        "method": membrane.method,
        "base_model": membrane.base_model,
        "metadata": membrane.metadata,
        **({} if membrane.named else {"named": False}),
        "pairs": [[*kind, indexes if len(indexes) < len(keys) else None] for kind, indexes in groups.items()],
    }
    if membrane.visual is not None:
        described |= described_side(membrane.visual)
    if (probe := membrane.probe) is not None:
        described["probe"] = _describe_probe(probe)
    return described


def _describe_probe(probe: GateProbe) -> dict:
    weight = probe.weight.detach().cpu().contiguous()
    described: dict[str, object] = {
        "low": probe.low,
        "high": probe.high,
        "separation": probe.separation,
        "dtype": _dtype_name(weight),
        "weight": base64.b64encode(bytes(weight.view(torch.uint8).tolist())).decode(),
    }
    measured = {name: getattr(probe, name) for name in ("false_closed", "false_open", "checked", "meaning")}
    described |= {name: value for name, value in measured.items() if value is not None}
    return described if probe.pooled is None else described | {"pooled": _describe_probe(probe.pooled)}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise MembraneError(f"dtype {name!r} in the metadata; expected a floating-point torch dtype")
    return dtype


# ---- reading -------------------------------------------------------------------------------------------------------


def _load_file(path: Path, concept: str | None, text_encoder: str, bias: str) -> list[Membrane]:
    tensors, metadata = read_safetensors(path)
    if "semiperm" not in metadata:
        return [_foreign(read_adapter(path), concept, text_encoder, bias)]
    try:
        looks = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        pairs = {name: tensor for name, tensor in tensors.items() if name not in looks}
        found = _unpack(_pairs(pairs) if pairs or not looks else {}, metadata, looks)
    except MembraneError as error:
        raise MembraneError(f"{str(path)!r}: {error}") from None
    return [found[0].with_concept(concept)] if concept is not None and len(found) == 1 else found


def _pairs(tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    unknown = [key for key in tensors if not key.endswith(_PARTS)]
    if unknown or not tensors:
        raise MembraneError(
            f"{len(unknown)} of {len(tensors)} keys are not of the form <module>.lora_down.weight, .lora_up.weight,"
            f" .alpha (for example {unknown[:3]}); expected an SPM or kohya LoRA file: LoHa, LoKr, DoRA and diffusers'"
            " own key names must be converted first"
        )
    modules = {}
    for key in dict.fromkeys(key.removesuffix(part) for key in tensors for part in _PARTS if key.endswith(part)):
        down, up, alpha = (tensors.get(key + part) for part in _PARTS)
        if down is None or up is None:
            raise MembraneError(f"{key} has no lora_{'down' if down is None else 'up'}.weight; the file is incomplete")
        if alpha is not None and alpha.numel() != 1:
            raise MembraneError(f"{key}.alpha has shape {tuple(alpha.shape)}; expected a scalar")
        try:
            modules[key] = LowRank(down, up, float(down.shape[0] if alpha is None else alpha))
        except MembraneError as error:
            raise MembraneError(f"{key}: {error}") from None
    return modules


def _foreign(adapter: AdapterFile, concept: str | None, text_encoder: str, bias: str) -> Membrane:
    """One membrane from a file of SPM's released code, or from any kohya LoRA."""
    check_dropped(adapter, text_encoder, bias)
    other = next((name for name in adapter.pairs or adapter.weights if not name.startswith("lora_")), None)
    if other is not None:
        raise MembraneError(
            f"{str(adapter.path)!r} ({adapter.layout}) names its modules as {other!r}; expected a membrane, SPM or"
            " kohya file here: import_membranes(pipe, path) reads it, and save_membranes then writes a file that loads"
            " everywhere"
        )

    def made(label: str) -> Membrane:
        kept = {key: value for key, value in adapter.metadata.items() if key not in _OURS}
        return Membrane(label, adapter.pairs, method="spm" if adapter.layout == "SPM" else "lora", metadata=kept)

    return membrane_of(adapter, made, concept)


def _unpack(modules: dict[str, LowRank], metadata: dict[str, str], looks: dict[str, Tensor]) -> list[Membrane]:
    try:
        if int(metadata["format_version"]) > FORMAT_VERSION:
            raise MembraneError(
                f"format version {metadata['format_version']}, this semiperm reads up to"
                f" {FORMAT_VERSION}; update semiperm"
            )
        described = json.loads(metadata["semiperm"])
        keys, entries = described["modules"], described["membranes"]
        plans = []  # one a membrane
        for entry in entries:
            plan: dict[str, _Kind] = {}
            for rank, alpha, down, up, indexes in entry["pairs"]:
                plan |= dict.fromkeys(keys if indexes is None else (keys[i] for i in indexes), (rank, alpha, down, up))
            plans.append(plan)
        shares: list[dict[str, LowRank]] = [{} for _ in entries]
        for key, pair in modules.items():
            owners = [index for index, plan in enumerate(plans) if key in plan]
            kinds = [plans[index][key] for index in owners]
            for index, share in zip(owners, _split(key, pair, kinds), strict=True):
                shares[index][key] = share
        missing = [key for share, plan in zip(shares, plans, strict=True) for key in plan if key not in share]
        if missing:
            raise MembraneError(f"the metadata names modules that the file lacks, such as {missing[:3]}")
        sides = [side_of(n, e["visual"], looks) if "visual" in e else None for n, e in enumerate(entries)]
        return [_membrane(*each) for each in zip(entries, shares, sides, strict=True)]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, MembraneError):
            raise
        raise MembraneError(f"the membrane metadata is damaged ({error!r}); load a fresh copy of the file") from None


def _split(key: str, pair: LowRank, kinds: list[_Kind]) -> list[LowRank]:
    """Undo `_stack`: the rank rows of each membrane, in its own dtypes and with its own alpha."""
    ranks = [kind[0] for kind in kinds]
    if sum(ranks) != pair.rank or min(ranks, default=0) < 1:
        raise MembraneError(f"{key} has rank {pair.rank}, its metadata says {ranks}")
    scales = [alpha / rank for rank, alpha, *_ in kinds]
    folded = _shared_scale(scales) is None
    shares = []
    for down, up, scale, (_, alpha, *dtypes) in zip(
        pair.down.split(ranks), pair.up.split(ranks, dim=1), scales, kinds, strict=True
    ):
        down, up = down.to(_dtype(dtypes[0])).contiguous(), up.to(_dtype(dtypes[1])).contiguous()
        shares.append(LowRank(down, up / scale if folded and scale else up, alpha))
    return shares


def _membrane(entry: dict, modules: dict[str, LowRank], side: VisualSide | None) -> Membrane:
    probe = None if entry.get("probe") is None else _probe(entry["probe"])
    fields = {name: entry[name] for name in ("concept", "surrogate", "method", "base_model", "metadata")}
    named = bool(entry.get("named", True))
    fields |= {"phrases": tuple(entry["phrases"]), "probe": probe, "named": named, "visual": side}
    return Membrane(modules=modules, **fields)


def _probe(entry: dict) -> GateProbe:
    weight = torch.frombuffer(bytearray(base64.b64decode(entry["weight"])), dtype=_dtype(entry["dtype"]))
    checked, pooled = entry.get("checked"), entry.get("pooled")  # files of semiperm 0.1 have neither
    return GateProbe(
        weight,
        entry["low"],
        entry["high"],
        entry["separation"],
        entry.get("false_closed"),
        entry.get("false_open"),
        None if checked is None else (int(checked[0]), int(checked[1])),
        None if pooled is None else _probe(pooled),
        entry.get("meaning"),
    )
