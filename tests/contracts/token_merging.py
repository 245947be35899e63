"""Negative token merging in the contract matrix, in both modes."""

from __future__ import annotations

import importlib

import torch
from comfy_stub import Model, sample
from contracts.entry import ALL, Entry, Record
from semiperm.methods.errors import TokenMergingError
from semiperm.methods.token_merging.config import NegativeTokenMergingConfig
from semiperm.methods.token_merging.record import MergeRecord
from semiperm.pipelines.token_merging.apply import apply_negative_token_merging

PICTURE = torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(3))
EVERYWHERE = {"threshold": -1.0, "blocks": ("",), "end": 1.0}


def away(pipe, **settings):
    """With words for the reference: a compiled graph cannot look at each image's own."""
    given = EVERYWHERE | {"reference": PICTURE, "reference_prompt": "a cat"} | settings
    return apply_negative_token_merging(pipe, NegativeTokenMergingConfig(**given))


def apart(pipe, **settings):
    return apply_negative_token_merging(pipe, NegativeTokenMergingConfig(**EVERYWHERE | settings))


def in_comfyui(start: float, end: float) -> dict:
    surgery = importlib.import_module("semiperm.nodes.token_merging.patch")
    model = Model(surgery.UNetModel())
    config = NegativeTokenMergingConfig(**EVERYWHERE | {"start": start, "end": end})
    patched = surgery.apply_token_merging_to(model, config)
    layer = patched.patches["attn1_output"]

    def denoise(x, timestep, context, *, transformer_options, **options):
        tokens = x.flatten(2).transpose(1, 2)
        layer(tokens, {**transformer_options, "block": ("output", 0)})
        return x

    sample(patched.attachment, denoise)
    return surgery.report_of(patched)


PUBLIC = ("apply_negative_token_merging", "remove_negative_token_merging")
RECORD = Record(
    MergeRecord.report,
    frozenset("mode references strength threshold window layers rows steps extra_rows".split()),
    frozenset("kind image pushed".split()),
    in_comfyui,
)
SHARED = {"public": PUBLIC, "families": ALL, "slot": "merging", "record": RECORD, "error": TokenMergingError}
ENTRIES = [
    Entry("merging-reference", apply=away, ready=lambda handle, size: handle.prepare(size, size), **SHARED),
    Entry("merging-diversity", apply=apart, cross_batch=True, **SHARED),
]
