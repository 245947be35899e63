"""docs/watermark.md, "Who can forge what": each cell of the table is an attack that runs here.

The model is one that cannot be wrong: the upper rows of its pictures show something, the rows below are their noise.
"""

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from semiperm.methods.watermark.config import DetectionConfig
from semiperm.methods.watermark.content import bind, content_bits
from semiperm.methods.watermark.detection import detect_in
from semiperm.methods.watermark.fields import fields_of, first_field, split
from semiperm.methods.watermark.keyring import Keyring, load_keyring, update_keyring
from semiperm.methods.watermark.keys import WatermarkKey
from semiperm.methods.watermark.mark import KeyedMark, Payload, capacity, read
from semiperm.methods.watermark.payload import code_of, lay
from torch import Tensor

SHAPE = (3, 40, 40)
SHOWN = 16  # rows of pixels
TRIES = 20
MARKED, MODEL, DETECTOR, KEYRING, CERTIFICATE = (
    "marked pictures, not the model",
    "a marked picture and the model",
    "an exported detector",
    "the full keyring",
    "the certificate's private key",
)
READ, PRESENT, VALID, MANIFEST = "can read the mark", "can fake *present*", "can fake *valid*", "can fake the manifest"


class Glass:
    multiple = 2

    def encode(self, pixels):
        return torch.stack(pixels)[..., SHOWN::2, ::2] * 8 - 4

    def invert(self, latents, steps):
        return latents


def picture(noise: Tensor, shown: Tensor) -> Tensor:
    below = (noise / 8 + 0.5).clamp(0, 1).repeat_interleave(2, -1).repeat_interleave(2, -2)
    return torch.cat([shown, below], -2)


def draw(noise, shown: Tensor) -> list[Tensor]:
    return [picture(*both) for both in zip(noise, shown, strict=True)]


def embedding(pixels: Tensor) -> Tensor:
    return (pixels[..., :SHOWN, :] - 0.5).flatten(1)


def contents(seed: int, count: int = TRIES) -> Tensor:
    return torch.rand(count, 3, SHOWN, 2 * SHAPE[2], generator=torch.Generator().manual_seed(seed))


def detect(pictures, key) -> list:
    return detect_in(list(pictures), Glass(), [key], DetectionConfig(ladder=(0,), embedding=embedding))


def verdicts(pictures, key) -> list[str]:
    return [result.verdict for result in detect(pictures, key)]


def secret(seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(32)


@pytest.fixture(scope="module")
def key():
    return WatermarkKey("studio", 3, "2026-11-25", secret(1), secret(2), secret(3))


def signed(key, count: int = TRIES, seed: int = 1) -> Tensor:
    payloads = [Payload(1000 + i) for i in range(count)]
    return KeyedMark(key).sample((count, *SHAPE), payloads, torch.Generator().manual_seed(seed))


def signed_and_bound(key, shown: Tensor, seed: int = 2) -> Tensor:
    payloads = [Payload(2000 + i) for i in range(len(shown))]
    noise = KeyedMark(key).sample((len(shown), *SHAPE), payloads, torch.Generator().manual_seed(seed), bound=True)
    return bind(noise, (shown - 0.5).flatten(1), key)


# ---- what each of them does ------------------------------------------------------------------------------------------


def reads_without_a_key(key) -> str:
    """Other keys, 20 of them, at a marked picture."""
    others = [WatermarkKey("guess", 5, "", secret(100 + i)) for i in range(TRIES)]
    found = detect_in([picture(signed(key, 1)[0], contents(1, 1)[0])], Glass(), others, DetectionConfig(ladder=(0,)))
    return "no" if found[0].verdict == "absent" else "yes"


def averages_marked_pictures(key) -> list[str]:
    """The signs that most of 200 marked pictures have, though the model would be needed to know them."""
    noise = signed(key, 200).sign().sum(0, keepdim=True)
    magnitude = torch.randn(TRIES, *SHAPE, generator=torch.Generator().manual_seed(3)).abs()
    return verdicts(draw(magnitude * noise.sign(), contents(2)), key)


def paints_into_marked_pictures(key, noise, shown) -> list[str]:
    """A fifth of the noise is the painter's, and so is what the picture shows."""
    noise = noise.clone()
    noise[..., :8] = torch.randn(noise[..., :8].shape, generator=torch.Generator().manual_seed(4))
    return verdicts(draw(noise, shown), key)


def moves_noise(key, noise) -> list:
    return detect(draw(noise, contents(5)), key)


def lays(detector, nonce: int, code_bits: np.ndarray, seed: int, form: int = 3) -> Tensor:
    """Noise with these bits in it, as a holder of the stream secret can make it: the binding says nothing yet."""
    fields = fields_of(SHAPE, form)
    flips = np.empty(len(fields.public), np.uint8)
    lay(flips, fields, detector, "", nonce, code_bits, first_field(fields, detector, ""))
    magnitude = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).abs()
    return magnitude * torch.from_numpy(1 - 2 * flips.astype(np.int8)).reshape(SHAPE)


def invents_payloads(detector) -> list[Tensor]:
    """A payload of the forger's own, with a seal that is guessed."""
    layout, generator = capacity(SHAPE), np.random.default_rng(6)
    code, made = code_of(fields_of(SHAPE), layout), []
    for i in range(TRIES):
        bits = [0, *generator.integers(0, 2, layout.total - 1)]
        made.append(lays(detector, int(generator.integers(1 << 30)), code.encode(bits), i))
    return made


def lifted(detector, row: Tensor, form: int) -> tuple[int, np.ndarray]:
    """Nonce and code bits, payload and seal in them, that a holder of a detector's copy reads in a picture."""
    (reading,) = read(row[None], [detector])
    fields, layout = fields_of(SHAPE, form), capacity(SHAPE)
    _, _, places = split(fields, first_field(fields, detector, "").positions)
    stream = detector.stream("payload", SHAPE, reading.nonce, len(places))
    values = row.flatten().numpy()[places] * (1 - 2 * stream.astype(np.float32))
    code = code_of(fields, layout)
    return reading.nonce, code.encode(code.decode(values)[0])


def binds_anew(detector, bound: Tensor, shown: Tensor, how: str) -> list[Tensor]:
    """Payload and seal of bound pictures, laid under a binding of the forger's for what `shown` shows."""
    made, layout = [], detector.layouts[-1]
    for i, (row, other) in enumerate(zip(bound, shown, strict=True)):
        noise = lays(detector, *lifted(detector, row, layout), i, layout)
        if how == "as format 1 did":  # audit of f6361e7: 6 of 6 valid
            own, form = detector, 1  # whose binding took the stream secret
        elif how == "under a guessed secret":
            own, form = WatermarkKey("forger", 3, "", detector.stream_key, secret(7), secret(8 + i)), 3
        else:  # "as it was"
            positions = split(fields_of(SHAPE), first_field(fields_of(SHAPE), detector, "").positions)[1]
            noise.view(-1)[positions] = noise.view(-1)[positions].abs() * row.flatten()[positions].sign()
            made.append(picture(noise, other))
            continue
        made.append(picture(bound_as(own, noise, (other - 0.5).flatten(), form), other))
    return made


def bound_as(key, noise: Tensor, features: Tensor, form: int) -> Tensor:
    (reading,) = read(noise[None], [key.detector()])
    fields = fields_of(SHAPE, key.layouts[-1])
    positions = split(fields, first_field(fields, key, "").positions)[1]
    stream = key.stream("binding" if form == 1 else "binding 2", SHAPE, reading.nonce, len(positions))
    bits = stream ^ content_bits(key, reading.nonce, features, len(positions), form=form)
    noise = noise.clone()
    noise.view(-1)[positions] = noise.view(-1)[positions].abs() * torch.from_numpy(1.0 - 2 * bits).float()
    return noise


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(request):
    """{(who, what): what the table says}"""
    from pathlib import Path

    text = (Path(request.config.rootpath) / "docs" / "watermark.md").read_text(encoding="utf-8")
    lines = re.search(r"## Who can forge what\n\n(.*?)\n\n", text, re.S)[1].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {(row[0], what): said for row in rows for what, said in zip(head[1:], row[1:], strict=True)}


def test_the_table_has_the_cells_that_are_tested(table):
    who = (MARKED, MODEL, DETECTOR, KEYRING, CERTIFICATE)
    assert set(table) == {(w, what) for w in who for what in (READ, PRESENT, VALID, MANIFEST)}
    assert [table[CERTIFICATE, what] for what in (READ, PRESENT, VALID)] == ["-", "-", "-"]  # no secret of the mark


def test_marked_pictures_without_the_model(key, table):
    assert table[MARKED, READ] == reads_without_a_key(key)
    assert averages_marked_pictures(key) == ["absent"] * TRIES
    assert table[MARKED, PRESENT] == "only by painting into a marked picture"
    assert table[MARKED, VALID] == "the same, unless content is bound"
    shown = contents(6)
    assert paints_into_marked_pictures(key, signed(key), contents(7)) == ["valid"] * TRIES
    assert (
        paints_into_marked_pictures(key, signed_and_bound(key, shown), shown) == ["valid"] * TRIES
    )  # no other content
    assert "valid" not in paints_into_marked_pictures(key, signed_and_bound(key, shown), contents(7))


def test_a_marked_picture_and_the_model(key, table):
    assert table[MODEL, READ] == reads_without_a_key(key)
    moved = moves_noise(key, signed(key))
    assert table[MODEL, PRESENT] == "yes: moves its noise to another picture"
    assert table[MODEL, VALID] == "yes, with *that* picture's payload, unless content is bound"
    assert [(r.verdict, r.payload.unique_id) for r in moved] == [("valid", 1000 + i) for i in range(TRIES)]
    moved = moves_noise(key, signed_and_bound(key, contents(6)))
    assert [r.verdict for r in moved] == ["content differs"] * TRIES


def test_an_exported_detector(key, table):
    detector = key.detector()
    found = detect(draw(signed(key), contents(1)), detector)
    assert table[DETECTOR, READ] == "yes"
    assert [(r.verdict, r.payload.unique_id) for r in found] == [("unverified", 1000 + i) for i in range(TRIES)]
    forged = draw(invents_payloads(detector), contents(1))
    assert table[DETECTOR, PRESENT] == "yes"
    assert verdicts(forged, key) == ["unverified"] * TRIES
    assert table[DETECTOR, VALID] == "no (as above with a picture)"


@pytest.mark.parametrize("how", ["as format 1 did", "under a guessed secret", "as it was"])
def test_a_detector_and_bound_pictures_forge_no_other_content(key, how):
    bound = signed_and_bound(key, contents(6))
    assert verdicts(draw(bound, contents(6)), key) == ["valid"] * TRIES
    forged = binds_anew(key.detector(), bound, contents(7), how)
    found = detect(forged, key)
    assert sum(r.verdict == "valid" for r in found) == 0
    assert all(r.verdict == "content differs" and r.log10_p < -6 for r in found)  # the lifted seal itself is right


def test_what_binding_cannot_do_is_as_the_page_says(key):
    """The negative of a picture says the opposite of each bit, so whoever knows where they lie turns all of them."""
    shown = contents(6, 2)
    noise = signed_and_bound(key, shown)
    positions = split(fields_of(SHAPE), first_field(fields_of(SHAPE), key.detector(), "").positions)[1]
    noise.view(2, -1)[:, positions] *= -1
    assert verdicts(draw(noise, 1 - shown), key) == ["valid"] * 2


def test_a_detector_does_not_vouch_for_content(key):
    shown = contents(6)
    bound = draw(signed_and_bound(key, shown), shown)
    for pictures in (bound, binds_anew(key.detector(), signed_and_bound(key, shown), contents(7), "as format 1 did")):
        found = detect(pictures, key.detector())
        assert all(r.verdict == "unverified" and r.content_p_value is None for r in found)


def test_the_full_keyring(key, table):
    shown = contents(8)
    assert {table[KEYRING, what] for what in (READ, PRESENT, VALID)} == {"yes"}
    assert verdicts(draw(signed_and_bound(key, shown), shown), key) == ["valid"] * 20


def test_the_manifest(key, table):
    """None of the mark's secrets is part of it: who has no private key signs with another one."""
    pytest.importorskip("c2pa")
    import io

    from certificates import chain
    from PIL import Image
    from semiperm.methods.provenance.c2pa import Credentials, read_manifest, sign
    from semiperm.methods.provenance.record import ALGORITHM, Provenance, embed

    owner, forger = chain(), chain()
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    about = {"algorithm": ALGORITHM, "key_id": key.key_id, "unique_id": "8000000000000001"}
    states = []
    for who in (owner, forger):
        credentials = Credentials(who.certificates, who.private_key, "es256")
        file = sign(embed(buffer.getvalue(), Provenance("canvas", generator_version="1", **about)), credentials)
        states.append(read_manifest(file, owner.authority).state)
    assert states == ["Trusted", "Valid"]  # the second: signed by anybody
    assert {table[who, MANIFEST] for who in (MARKED, MODEL, DETECTOR, KEYRING)} == {"no"}
    assert table[CERTIFICATE, MANIFEST] == "yes"


# ---- formats ---------------------------------------------------------------------------------------------------------

OLD = WatermarkKey("old", 9, "2026-01-01", bytes(range(32)), bytes(range(32, 64)), since=1)


def signed_in_format_1(shown: Tensor) -> Tensor:
    """As commit f6361e7 signed and bound: its MAC's message and its streams, spelled out."""
    fields, layout = fields_of(SHAPE, 1), capacity(SHAPE)
    generator, rows = np.random.default_rng(9), []
    for i, own in enumerate(shown):
        nonce = int(generator.integers(1 << 30))
        values = {"bound": (1, 1), "version": (1, 3), "time": (0, 32), "unique_id": (3000 + i, 32)}
        body = [value >> (width - 1 - bit) & 1 for value, width in values.values() for bit in range(width)]
        assert len(body) == layout.payload
        message = json.dumps(["payload", "", *SHAPE, OLD.key_id, nonce, "".join(map(str, body))]).encode()
        seal = OLD.mac(message, layout.mac)
        bits = body + [seal >> (layout.mac - 1 - bit) & 1 for bit in range(layout.mac)]
        noise = lays(OLD, nonce, code_of(fields, layout).encode(bits), i, 1)
        positions = split(fields, first_field(fields, OLD, "").positions)[1]
        features = (own - 0.5).flatten().numpy()
        directions = OLD.stream("content", features.shape, nonce, len(positions) * len(features))
        sides = (1 - 2 * directions.reshape(len(positions), -1).astype(np.float32)) @ features
        flips = OLD.stream("binding", SHAPE, nonce, len(positions)) ^ (sides < 0)
        noise.view(-1)[positions] = noise.view(-1)[positions].abs() * torch.from_numpy(1.0 - 2 * flips).float()
        rows.append(noise)
    return torch.stack(rows)


def test_old_pictures_are_read_but_their_content_is_not_vouched_for():
    shown = contents(6, 4)
    old = signed_in_format_1(shown)
    assert OLD.formats == (3, 2, 1)
    found = detect(draw(old, shown), OLD)
    assert [(r.verdict, r.payload.unique_id) for r in found] == [("unverified", 3000 + i) for i in range(4)]
    assert all(r.content_p_value < 1e-6 for r in found)
    moved = detect(draw(old, contents(7, 4)), OLD)
    assert [r.verdict for r in moved] == ["content differs"] * 4
    forged = detect(binds_anew(OLD.detector(), old, contents(7, 4), "as format 1 did"), OLD)
    assert [r.verdict for r in forged] == ["unverified"] * 4
    assert all(r.content_p_value < 1e-6 for r in forged)  # the attack itself works, which is why


def test_an_old_keyring_signs_in_the_new_format(tmp_path):
    file = tmp_path / "old.json"
    record = {"name": "old", "key_id": 9, "created": "2026-01-01"}
    record |= {
        "stream_key": base64.b64encode(OLD.stream_key).decode(),
        "mac_key": base64.b64encode(OLD.mac_key).decode(),
    }
    file.write_text(json.dumps({"format": "semiperm-watermark-keyring", "version": 1, "keys": [record]}))
    file.chmod(0o600)
    (key,) = load_keyring(file)
    assert key == OLD and key.content_key not in (None, key.stream_key, key.mac_key)
    shown = contents(6, 4)
    bound = signed_and_bound(key, shown)
    assert all(reading.format == 3 for reading in read(bound, [key]))
    assert verdicts(draw(bound, shown), key) == ["valid"] * 4
    new = replace(key, since=3)  # the forger lays the picture out as it was found
    forged = binds_anew(new.detector(), bound, contents(7, 4), "as format 1 did")
    assert verdicts(forged, key) == ["content differs"] * 4
    assert WatermarkKey.new("new", 1).formats == (3,)
    assert Keyring([key]).detector().get("old").formats == (3, 2, 1)


def test_marks_of_format_2_are_read_by_their_keys_alone(tmp_path):
    """As commit 7313e84 laid and sealed them, under keyrings as it wrote them."""
    kept = json.loads((Path(__file__).parent / "marks_of_format_2.json").read_text())
    file = tmp_path / "ring.json"
    file.write_text(json.dumps(kept["keyring"]))
    file.chmod(0o600)
    ring = load_keyring(file)
    assert [key.formats for key in ring] == [(3, 2, 1), (3, 2)]  # the first had been made before format 2
    for mark in kept["marks"]:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(mark["signs"]), np.uint8))
        latents = torch.from_numpy(1.0 - 2 * bits.astype(np.float32)).reshape(1, *mark["shape"])
        key = ring.get(mark["key"])
        (reading,) = read(latents, list(ring))
        assert (reading.key_name, reading.mac_ok, reading.format) == (mark["key"], True, 2)
        assert reading.payload.unique_id == mark["unique_id"] and reading.log10_p < -100
        (unread,) = read(latents, [replace(key, since=3)])
        assert unread.payload is None and unread.log10_p > -6
        update_keyring(file, lambda ring: ring.new(f"later {len(ring)}"))  # written again in the newest version
        assert list(load_keyring(file))[:2] == list(ring)
        assert read(latents, [load_keyring(file).get(mark["key"]).detector()])[0].payload.unique_id == 77
