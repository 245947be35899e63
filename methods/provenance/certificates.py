"""A certificate chain for trying out C2PA manifests: an authority of one's own, and a signer that it vouches for.

Anybody can make such a chain with any name in it. Files that it signs are "Valid", and "Trusted" only where the
authority's certificate is given as trusted (`examine`, `semiperm provenance --trust`); no viewer trusts it.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from ..errors import WatermarkError

_USAGES = (
    "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    " encipher_only decipher_only"
).split()
_ISSUES = {"key_cert_sign", "crl_sign"}
_EARLIER = datetime.timedelta(hours=1)  # clocks differ


@dataclass(frozen=True)
class TrialChain:
    """All in PEM: the signer's certificate and the authority's behind it, the authority's alone, the signer's key."""

    chain: bytes
    authority: bytes
    private_key: bytes = field(repr=False)


def trial_chain(name: str, days: int = 30) -> TrialChain:
    """Make a chain for trying out; the authority's private key is forgotten at once.

    Args:
        name: of the signer, as viewers show it; 1 to 64 characters.
        days: that it holds, 1 to 366.

    Raises:
        WatermarkError: a name or a time out of range.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if not 1 <= len(name) <= 64 or not name.isprintable() or not 1 <= days <= 366:
        raise WatermarkError(
            f"a test certificate for {name!r} and {days} days was asked for; expected a name of 1 to 64 characters and"
            " 1 to 366 days"
        )
    now = datetime.datetime.now(datetime.timezone.utc)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def named(text: str) -> x509.Name:
        organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "For trying out, not trusted")
        return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def certificate(text: str, subject, authority: bool) -> bytes:
        usages = _ISSUES if authority else {"digital_signature"}
        builder = x509.CertificateBuilder().subject_name(named(text)).issuer_name(named("Test authority"))
        builder = builder.public_key(subject.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - _EARLIER).not_valid_after(now + datetime.timedelta(days=days))
        builder = builder.add_extension(x509.BasicConstraints(authority, None), True)
        builder = builder.add_extension(x509.KeyUsage(**{usage: usage in usages for usage in _USAGES}), True)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        builder = builder.add_extension(issuer, False)
        if not authority:  # C2PA takes e-mail's purpose as well, which every tool knows
            builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    own, authority = certificate(name, key, False), certificate("Test authority", authority_key, True)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return TrialChain(own + authority, authority, secret)
