"""Membranes in the contract matrix."""

from __future__ import annotations

import importlib

import torch
from comfy_stub import Sampling, sample
from contracts.entry import Entry, Record, RoundTrip
from semiperm.methods.errors import MembraneError
from semiperm.methods.membranes.config import MembraneConfig
from semiperm.methods.membranes.file import load_membranes, save_membranes
from semiperm.methods.membranes.gate_bank import GateBank
from semiperm.methods.membranes.record import membrane_report
from semiperm.methods.membranes.types import GateProbe, LowRank, Membrane, Membranes
from semiperm.methods.membranes.visual import VisualSide, VisualSite
from semiperm.pipelines.family import denoiser_of, family_of
from semiperm.pipelines.membranes.apply import apply_membranes
from semiperm.pipelines.membranes.visual import image_layers
from semiperm.pipelines.text import module_keys

WANTED = ("attn", "ff", "proj_in", "proj_out", "context_embedder", "text_embedder")


def strong(pipe, seed=0, rank=2, scale=0.3, concept="robot", **fields) -> Membrane:
    """A membrane over many kinds of projections, as trained adapters have them."""
    denoiser, attribute = denoiser_of(pipe)
    noise = torch.Generator().manual_seed(seed)
    modules = {}
    for key, (path, module) in module_keys(denoiser, attribute).items():
        weight = module.weight
        if not any(part in path for part in WANTED) or (weight.ndim == 4 and tuple(weight.shape[2:]) != (1, 1)):
            continue
        if "norm" in path:
            continue
        out, width = weight.shape[:2]
        tail = (1, 1) if weight.ndim == 4 else ()
        down = torch.randn(rank, width, *tail, generator=noise) * scale / width**0.5
        up = torch.randn(out, rank, *tail, generator=noise) * scale
        modules[key] = LowRank(down, up, float(rank))
    return Membrane(concept, modules, **fields)


def look(pipe, seed=0, rank=1, concept="robot", low=-0.2, beta=2.0, **fields) -> Membrane:
    """An image-side membrane on every layer that can have one: open for most tokens, otherwise at either knot."""
    noise, sites = torch.Generator().manual_seed(seed), {}
    for key, (module, _) in image_layers(*denoiser_of(pipe), family_of(pipe)).items():
        read, write = (torch.randn(2, rank, module.out_features, generator=noise) for _ in range(2))
        gates = torch.tensor([0.0, low, low + 0.5, low, low + 1.0]).expand(2, rank, 5).clone()
        sites[key] = VisualSite(read, write / module.out_features**0.5, gates)
    return Membrane(concept, {}, method="visual/words", visual=VisualSide((0.1, 0.8), sites, beta, **fields))


def probe(width: int) -> GateProbe:
    """Half open for most texts."""
    return GateProbe(torch.randn(width, generator=torch.Generator().manual_seed(0)), -50.0, 50.0)


def apply(pipe, **settings):
    """Two membranes: one gated by a probe, one by SPM's gate."""
    about = denoiser_of(pipe)[0].config
    width = about.get("cross_attention_dim") or about["joint_attention_dim"]
    stack = [strong(pipe, 0, probe=probe(width)), strong(pipe, 1, concept="house")]
    return apply_membranes(pipe, stack, MembraneConfig(**settings))


def apply_looks(pipe, **settings):
    """Two image-side membranes, of one direction and of two."""
    stack = [look(pipe, 0), look(pipe, 1, rank=2, concept="house")]
    return apply_membranes(pipe, stack, MembraneConfig(**settings))


def look_files(folder) -> RoundTrip:
    site = VisualSite(torch.randn(2, 1, 8), torch.randn(2, 1, 8).half(), torch.rand(2, 1, 5).cumsum(-1))
    side = VisualSide((0.25, 0.75), {"lora_unet_a": site}, 2.5, 0.01, 99, 0.125, 16)
    pairs = {"lora_unet_a": LowRank(torch.randn(2, 8), torch.randn(8, 2), 3.0)}
    stack = Membranes(
        [
            Membrane("robot", {}, method="visual/words", base_model="0123456789abcdef", visual=side),
            Membrane("robot", pairs, method="uce", probe=probe(8)),
            Membrane("ghost", {}, method="visual/pictures", visual=side),
        ]
    )
    path = save_membranes(stack, folder / "looks.safetensors")
    words = ("semiperm-membrane", "visual/pictures", "0123456789abcdef", "robot", "ghost", "false_open", "lora_unet_a")
    return RoundTrip(path, _flat(stack), _flat(load_membranes(path)), words)


def files(folder) -> RoundTrip:
    pairs = {f"lora_unet_{n}": LowRank(torch.randn(2, 8), torch.randn(6, 2).bfloat16(), 3.0) for n in "ab"}
    stack = Membranes(
        Membrane(name, pairs, surrogate="tree", method="uce", base_model="0123456789abcdef", probe=probe(8))
        for name in ("robot", "ghost")
    )
    path = save_membranes(stack, folder / "two.safetensors")
    words = ("semiperm-membrane", "format_version", "uce", "0123456789abcdef", "robot", "ghost", "tree")
    return RoundTrip(path, _flat(stack), _flat(load_membranes(path)), words)


def _flat(stack) -> dict:
    """All that a file has to keep of membranes: on the prompt side, on the image side, or on both."""
    found = {}

    def keep(where: str, one, *names: str) -> None:
        found.update({f"{where} {name}": getattr(one, name) for name in names})

    for i, m in enumerate(stack):
        keep(f"{i}", m, "concept", "surrogate", "method", "base_model", "phrases", "keys")
        if m.probe is not None:
            keep(f"{i} probe", m.probe, "weight", "low", "high")
        for key, pair in m.modules.items():
            keep(f"{i} {key}", pair, "down", "up", "alpha")
        if m.visual is not None:
            keep(f"{i} looks", m.visual, "shares", "beta", "false_open", "calibrated", "false_closed", "checked")
            for key, site in m.visual.sites.items():
                keep(f"{i} {key}", site, "read", "write", "gates")
    return found


def in_comfyui(start: float, end: float) -> dict:
    surgery = importlib.import_module("semiperm.nodes.membranes.patch")
    progress = importlib.import_module("semiperm.nodes.progress").Progress(Sampling())
    pairs = {"lora_unet_a": LowRank(torch.ones(1, 8), torch.ones(8, 1), 1.0)}
    stack, config = Membranes([Membrane("robot", pairs)]), MembraneConfig(gate="always", start=start, end=end)
    bank = GateBank(None, stack, config.gate)
    patch, projection = surgery.MembranePatch(stack, config, bank, progress), torch.nn.Linear(8, 8)
    packed = surgery.pack(stack, "lora_unet_a", cross_terms=False)
    patch.sites.append(surgery.Site(patch, "lora_unet_a", projection, packed))

    def model(x, timestep, context, **options):
        patch.sites[0](projection.forward, projection, context)
        return x

    sample(patch, model)
    return patch.report()


RECORD = Record(
    membrane_report,
    frozenset("concepts gates strength window modules idle_modules modes silent rows steps".split()),
    frozenset("row kind prompt source gamma opened".split()),
    in_comfyui,
)
ENTRIES = [
    Entry(
        "membranes",
        ("apply_membranes", "remove_membranes", "save_membranes", "load_membranes"),
        apply=apply,
        slot="membranes",
        files=files,
        record=RECORD,
        error=MembraneError,
    ),
    Entry(
        "membranes-image",
        ("apply_membranes", "remove_membranes", "save_membranes", "load_membranes"),
        apply=apply_looks,
        slot="membranes",
        files=look_files,
        record=RECORD,
        error=MembraneError,
    ),
]
