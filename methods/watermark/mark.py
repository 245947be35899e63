"""Keyed payload mark in the initial noise, with exact statistics and no database.

sign(z_i) = keystream_i XOR codeword_i and |z_i| half-normal: under a random key the noise of each image is exactly
N(0, I). The nonce, fresh for each image, lies in the latent itself (fields.py), the payload under an error-correcting
code (code.py).

Who can do what: a holder of the stream secret can read marks, forge their presence and copy a payload; only a holder
of the MAC secret can make a payload that verifies. The MAC binds payload, key, nonce, shape and format (keys.py), not
the picture: who inverts a marked picture can carry its whole noise over to another (transplant), and content binding,
which takes the content secret, has to catch that.

Images of one key can be linked without it where two share a nonce's first field, and who compares their noise sees it:
it has 18 bits, and 28 from 16,384 elements on, so by the birthday's law two of some 600 images do, of 20,000 in large
latents. Where there is no second field such a pair shares all signs up to the difference of its payloads.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import WatermarkError
from .fields import fields_of, first_field
from .keys import FORMAT, WatermarkKey
from .payload import Layout, Payload, body_of, capacity, code_of, image_shape, lay, seal
from .reading import Reading, read

__all__ = ["KeyedMark", "Layout", "Payload", "Reading", "capacity", "read"]


class KeyedMark:
    """Initial noise that carries a payload under one key.

    Args:
        key: a full key to sign; a detector's copy can only read.
        scope: a model or tenant name that separates its marks from others of the key; "" for none.
        form: of the pictures, see keys.py; 2 signs as older releases did, for comparison.
    """

    def __init__(self, key: WatermarkKey, scope: str = "", form: int = FORMAT):
        self.key, self.scope, self.form = key, scope, form

    def sample(
        self,
        shape: Sequence[int],
        payload: Payload | Sequence[Payload] | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        bound: bool = False,
    ) -> Tensor:
        """Marked latents: each image exactly N(0, I), under a nonce of its own.

        Args:
            shape: (B, C, H, W), (B, C, F, H, W) or packed (B, N, C); the image is read in the shape it was signed in.
            payload: one for all images, or one for each; None draws a unique id for each and takes the time now.
            generator: makes magnitudes, nonces and drawn ids reproducible; without it they come from torch's global
                generator and the operating system. Images signed with the same generator state share their nonce.
            dtype, device: of the result.
            bound: say that the content of each picture is bound; `content.bind` then has to do it.

        Raises:
            WatermarkError: a shape that cannot carry a mark, a payload that does not fit, a key without MAC secret.
        """
        shape = tuple(int(size) for size in shape)
        image, batch = image_shape(shape), shape[0]
        fields, layout = fields_of(image, self.form), capacity(image)
        if not (payload is None or isinstance(payload, Payload)) and len(payload) != batch:
            raise WatermarkError(f"{len(payload)} payloads were given for {batch} images; give one, or one for each")
        source = generator.device if generator is not None else "cpu"
        magnitude = torch.randn(shape, generator=generator, device=source)
        flips = np.empty((batch, len(fields.public)), np.uint8)
        first = first_field(fields, self.key, self.scope)
        for index in range(batch):
            if generator is None:
                drawn = secrets.token_bytes(16)
            else:
                drawn = bytes(torch.randint(0, 256, (16,), generator=generator, device=source).tolist())
            nonce = int.from_bytes(drawn[:8], "big") % fields.nonces  # a power of two: uniform
            if payload is None:
                fresh = int.from_bytes(drawn[8:], "big") % (1 << layout.unique_id)
                entry = Payload(fresh, time=int(time.time()) % (1 << 32))
            else:
                entry = payload if isinstance(payload, Payload) else payload[index]
            body = body_of(entry, self.key, layout, bound)
            sealed = body + seal(fields, layout, self.key, self.scope, nonce, body, self.form)
            lay(flips[index], fields, self.key, self.scope, nonce, code_of(fields, layout).encode(sealed), first)
        signs = torch.from_numpy(1 - 2 * flips.astype(np.int8)).reshape(shape)
        return (magnitude.abs_() * signs.to(source)).to(device=device, dtype=dtype)

    def read(self, latents: Tensor, keys: Iterable[WatermarkKey] | None = None) -> list[Reading]:
        """`read` in this mark's scope, under its own key unless others are given."""
        return read(latents, [self.key] if keys is None else keys, scope=self.scope)
