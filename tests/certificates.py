"""Certificates for the tests alone, made afresh: an authority, and a signer that it vouches for."""

import datetime
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Chain:
    """PEM: the signer's certificate and its authority's, the authority's alone, the signer's private key."""

    certificates: bytes
    authority: bytes
    private_key: bytes


def new_key(kind: str = "p256"):
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:]))
    return ec.generate_private_key({"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}[kind])


def pem_of(key, password: bytes | None = None) -> bytes:
    hidden = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


def chain(
    kind: str = "p256", *, days: tuple[int, int] = (-1, 30), purpose=ExtendedKeyUsageOID.EMAIL_PROTECTION
) -> Chain:
    """A signer's certificate for e-mail or another purpose, valid from days[0] to days[1] from now."""
    authority_key, key = new_key(), new_key(kind)
    now = datetime.datetime.now(datetime.timezone.utc)

    def certificate(name: str, subject_key, issuer: str, signing_key, extensions):
        def named(text):
            return x509.Name(
                [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"), x509.NameAttribute(NameOID.COMMON_NAME, text)]
            )

        builder = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer))
        builder = builder.public_key(subject_key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now + datetime.timedelta(days=days[0]))
        builder = builder.not_valid_after(now + datetime.timedelta(days=days[1]))
        issuing = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
        for extension, critical in (*extensions, (issuing, False)):
            builder = builder.add_extension(extension, critical)
        algorithm = None if isinstance(signing_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        return builder.sign(signing_key, algorithm).public_bytes(serialization.Encoding.PEM)

    def usage(authority: bool):
        names = (
            "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign"
            " crl_sign encipher_only decipher_only"
        )
        return x509.KeyUsage(
            **{n: n in (("key_cert_sign", "crl_sign") if authority else ("digital_signature",)) for n in names.split()}
        )

    root = [(x509.BasicConstraints(True, None), True), (usage(True), True)]
    leaf = [(x509.BasicConstraints(False, None), True), (usage(False), True)]
    leaf.append((x509.ExtendedKeyUsage([purpose]), False))
    authority = certificate("Authority", authority_key, "Authority", authority_key, root)
    own = certificate("Signer", key, "Authority", authority_key, leaf)
    return Chain(own + authority, authority, pem_of(key))
