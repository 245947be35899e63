"""C2PA manifests (Content Credentials): a provenance record signed with a certificate, over every byte of the file.

The manifest says that the picture was created by a trained model (`c2pa.created`) and that it carries a mark
(`c2pa.watermarked.bound`); its soft binding names the mark, so that it can be found again by the mark where it was
stripped from the file. It is the last thing written: any later change, of metadata too, makes it invalid.

Needs the package c2pa-python. Nothing is fetched from the network, and no time stamp is asked for: the signature is
worth something as long as the certificate is.

Source: C2PA Technical Specification 2.4, sections 18.10 (soft binding) and 18.15 (actions).
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ..errors import WatermarkError
from ..packages import install_command
from .picture_file import parse
from .record import ALGORITHM, Provenance, extract

_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


def _c2pa():
    try:
        import c2pa
    except (ImportError, OSError) as error:  # OSError: its native library is for another system
        raise WatermarkError(
            "C2PA manifests need the package c2pa-python, which this Python lacks; run"
            f" `{install_command('c2pa-python')}`"
        ) from error
    return c2pa


@dataclass(frozen=True)
class Credentials:
    """What signs manifests; `load_credentials` makes it. Its repr hides the key.

    Args:
        certificates: PEM, the signer's own first, then those that issued it.
        private_key: PEM (PKCS #8), without a password.
        algorithm: es256, es384, es512, ps256 or ed25519.
    """

    certificates: bytes
    private_key: bytes = field(repr=False)
    algorithm: str


@dataclass(frozen=True)
class Manifest:
    """What the active manifest of a file says.

    state: "Trusted" (signature and file agree, and the signer is among the certificates given as trusted), "Valid"
    (they agree, the signer may be anybody) or "Invalid". failures: the validator's codes. signer: common name and
    organisation, as the certificate has them. generator, model, time, source_type, binding (key id and unique id of
    our mark): None where the manifest is silent. Texts come from the file: show them as such.
    """

    state: str
    failures: tuple[str, ...]
    signer: str | None
    generator: str | None
    model: str | None
    time: str | None
    source_type: str | None
    binding: str | None


def load_credentials(certificates: str | Path, private_key: str | Path) -> Credentials:
    """Read a certificate chain and its private key, and check that they can sign.

    Raises:
        WatermarkError: c2pa-python is missing; a file that cannot be read or is not PEM; a key with a password, of
            an unusable kind, or of another certificate; a certificate out of date.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    _c2pa()
    chain, secret = (_read(path, what) for path, what in ((certificates, "certificate"), (private_key, "private key")))
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError:
        raise WatermarkError(f"{certificates} holds no certificate in PEM form") from None
    try:
        key = serialization.load_pem_private_key(secret, None)
    except TypeError:
        raise WatermarkError(f"the private key {private_key} has a password; give one without") from None
    except Exception:  # parse errors may quote what they read: the key
        raise WatermarkError(f"{private_key} holds no private key in PEM form that can be read") from None
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        algorithm = _CURVES[key.curve.name]
    elif isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        algorithm = "ps256"
    elif isinstance(key, ed25519.Ed25519PrivateKey):
        algorithm = "ed25519"
    else:
        raise WatermarkError(
            f"the private key {private_key} cannot sign manifests; expected ECDSA on P-256, P-384 or P-521, Ed25519,"
            " or RSA of 2048 bits and more"
        )
    if leaf.public_key() != key.public_key():
        raise WatermarkError(
            f"the private key {private_key} is not that of the first certificate in {certificates}; put the signer's"
            " certificate first"
        )
    if not leaf.not_valid_before_utc <= datetime.now(timezone.utc) <= leaf.not_valid_after_utc:
        raise WatermarkError(
            f"the certificate in {certificates} holds from {leaf.not_valid_before_utc:%Y-%m-%d} to"
            f" {leaf.not_valid_after_utc:%Y-%m-%d}, not today; renew it"
        )
    pkcs8 = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Credentials(chain, pkcs8, algorithm)


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise WatermarkError(f"the {what} {str(path)!r} cannot be read: {error.strerror}") from None


def sign(data: bytes, credentials: Credentials) -> bytes:
    """Sign a picture file as the last step of making it.

    Args:
        data: a PNG, JPEG or WebP file with a provenance record (`provenance.embed`), which the manifest repeats.
        credentials: of `load_credentials`.

    Returns:
        The file with the manifest inside, read again and found valid.

    Raises:
        WatermarkError: no record, signed already, or a certificate that C2PA does not accept.
    """
    c2pa, file, record = _c2pa(), parse(data), extract(data)
    if record is None:
        raise WatermarkError("the picture has no provenance record to sign; write it first (`provenance.embed`)")
    if file.has_manifest:
        raise WatermarkError("the picture is signed (C2PA) already; a second manifest would replace the first")
    certificates = credentials.certificates.decode("ascii", "replace")
    info = c2pa.C2paSignerInfo(credentials.algorithm, certificates.encode(), credentials.private_key, None)
    signed = io.BytesIO()
    try:
        with (
            c2pa.Context(c2pa.Settings.from_dict(_SETTINGS)) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(_definition(record, file.mime), context) as builder,
        ):
            builder.sign(signer, file.mime, io.BytesIO(data), signed)
    except c2pa.C2paError as error:
        raise WatermarkError(
            f"the C2PA manifest could not be signed ({_first_line(error)}); it takes a certificate whose purpose"
            " (extended key usage) is C2PA, document or e-mail signing"
        ) from None
    manifest = read_manifest(signed.getvalue())
    if manifest.state == "Invalid" or manifest.binding != record.binding:
        raise WatermarkError(f"the C2PA manifest did not verify ({', '.join(manifest.failures)}); nothing was signed")
    return signed.getvalue()


def _definition(record: Provenance, mime: str) -> dict:
    created = {
        "action": "c2pa.created",
        "digitalSourceType": record.digital_source_type,
        "softwareAgent": {"name": record.model},
    }
    if record.time:
        created["when"] = record.time
    actions, assertions = [created], []
    if record.binding is not None:
        actions.append({"action": "c2pa.watermarked.bound"})
        binding = {"alg": record.algorithm or ALGORITHM, "blocks": [{"scope": {}, "value": record.binding}]}
        assertions.append({"label": "c2pa.soft-binding", "data": binding})
    return {
        "claim_generator_info": [{"name": record.generator, "version": record.generator_version or "unknown"}],
        "format": mime,
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": actions}}, *assertions],
    }


def read_manifest(data: bytes, trust: bytes | None = None) -> Manifest:
    """Read and verify the active manifest of a picture file, of any program.

    Args:
        data: the whole file.
        trust: certificates (PEM) of authorities whose signers are trusted.

    Raises:
        WatermarkError: c2pa-python is missing, no manifest, or one that cannot be read at all.
    """
    c2pa, mime = _c2pa(), parse(data).mime
    settings = dict(_SETTINGS)
    if trust is not None:
        settings["trust"] = {"trust_anchors": trust.decode("ascii", "replace")}
    try:
        with (
            c2pa.Context(c2pa.Settings.from_dict(settings)) as context,
            c2pa.Reader(mime, io.BytesIO(data), None, context) as reader,
        ):
            store = json.loads(reader.json())
    except c2pa.C2paError as error:
        raise WatermarkError(f"the C2PA manifest cannot be read ({_first_line(error)})") from None
    return _summary(store)


def _summary(store: dict) -> Manifest:
    active = store.get("manifests", {}).get(store.get("active_manifest"), {})
    results = store.get("validation_results", {})
    parts = [results.get("activeManifest", {})]
    parts += [delta.get("validationDeltas", {}) for delta in results.get("ingredientDeltas", ())]
    state = store.get("validation_state", "Invalid")
    codes = dict.fromkeys(str(entry.get("code")) for part in parts for entry in part.get("failure", ()))
    if state != "Invalid":
        codes = {}  # an unknown signer is told by the state
    signature = active.get("signature_info", {})
    signer = [signature[name] for name in ("common_name", "issuer") if signature.get(name)]
    created, binding = {}, None
    for assertion in active.get("assertions", ()):
        label, content = assertion.get("label", ""), assertion.get("data", {})
        if label.startswith("c2pa.actions"):
            made = [action for action in content.get("actions", ()) if action.get("action") == "c2pa.created"]
            created = created or (made[0] if made else {})
        elif label.startswith("c2pa.soft-binding") and content.get("alg") == ALGORITHM:
            values = [block.get("value") for block in content.get("blocks", ())]
            binding = next(
                (v for v in values if isinstance(v, str) and re.fullmatch("[0-9a-f]{3}-[0-9a-f]{16}", v)), None
            )
    agent = created.get("softwareAgent")
    return Manifest(
        state=state,
        failures=tuple(codes),
        signer=", ".join(map(str, signer)) or None,
        generator=" ".join(_generator(active)) or None,
        model=agent.get("name") if isinstance(agent, dict) else agent,
        time=created.get("when"),
        source_type=created.get("digitalSourceType"),
        binding=binding,
    )


def _generator(active: dict) -> list[str]:
    info = next(iter(active.get("claim_generator_info") or ()), {})
    return [str(info[name]) for name in ("name", "version") if info.get(name)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
