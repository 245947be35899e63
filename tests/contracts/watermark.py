"""Signed noise in the contract matrix: it acts through the latents that a pipeline starts from."""

from __future__ import annotations

import diffusers
import torch
from contracts.entry import ALL, Entry, RoundTrip
from marks import key_of, seeded
from semiperm.methods.errors import ModelError
from semiperm.methods.watermark.keyring import Keyring, load_keyring, save_keyring
from semiperm.methods.watermark.mark import Payload
from semiperm.pipelines.family import family_of
from semiperm.pipelines.watermark.sign import sign_noise

KEY = key_of(7)


def inputs(pipe, images: int, seed: int, size: int) -> dict:
    frames = {"frames": 5} if family_of(pipe).video else {}
    rows = [sign_noise(pipe, KEY, 1, size, size, Payload(5), seeded(seed + i), **frames) for i in range(images)]
    return {"latents": torch.cat(rows)}


def refuses(pipe) -> None:
    """A sampler that adds noise of its own drowns the mark."""
    own = pipe.scheduler
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler()
    try:
        sign_noise(pipe, KEY, 1, 32, 32)
    finally:
        pipe.scheduler = own


def files(folder) -> RoundTrip:
    """Keys are JSON: they are no tensors, and a person should be able to look at them."""
    ring = Keyring([KEY, key_of(8).detector()])
    path = save_keyring(ring, folder / "keys.json")
    before, after = ({f"{i} key": key for i, key in enumerate(keys)} for keys in (ring, load_keyring(path)))
    return RoundTrip(path, before, after, ("format", "version", "key 7", "key 8"))


ENTRIES = [
    Entry(
        "signed-noise",
        ("sign_noise",),
        ALL,
        inputs=inputs,
        size=32,
        files=files,
        refuses=refuses,
        error=ModelError,
    )
]
