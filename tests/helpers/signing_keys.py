"""Pairs of keys for tests of signatures."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def write_keys(folder: Path, curve: ec.EllipticCurve | None = None) -> tuple[Path, Path]:
    """A new private key and its public one, as PEM files in ``folder``."""
    private, public = folder / "key.pem", folder / "key.pub.pem"
    key = ec.generate_private_key(curve or ec.SECP256R1())
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public
