"""Signatures of whole folders by OpenSSF model signing, with an elliptic-curve key of one's own: nothing needs a network.

The signature is a file ``model.sig`` in the folder, a Sigstore bundle over the SHA-256 of every other file; model signing's own
command checks it too. It says that whoever has the private key made the folder as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchslim.errors import InputRejected, Unavailable, UsageError
from patchslim.files import read_bounded
from patchslim.packages import install_command

SIGNATURE = "model.sig"
_MAX_SIGNATURE, _MAX_KEY = 16 << 20, 1 << 16  # bytes


def check_private_key(key: Path) -> None:
    """Raise ``UsageError`` unless ``key`` is a private key that can sign, ``Unavailable`` without model signing."""
    _signer(key)


def sign_folder(folder: Path, key: Path) -> None:
    """Sign every file under ``folder`` with the private ``key`` (PEM, P-256, P-384 or P-521) in ``model.sig``.

    Raises ``UsageError`` for a key that cannot sign, ``Unavailable`` without model signing.
    """
    _signer(key).set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)


def verify_folder(folder: Path, public_key: Path) -> None:
    """Check that ``model.sig`` in ``folder`` is the signature of everything else in it by the owner of ``public_key`` (PEM).

    Raises ``InputRejected`` where it is not, ``UsageError`` for what is no such key, ``Unavailable`` without model signing.
    """
    _, verifying = _libraries()
    path = folder / SIGNATURE
    config = verifying.Config()
    _read_key(public_key, "--public-key")
    try:
        config.use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # of cryptography, which has no base of its own
        raise UsageError(f"--public-key {public_key}: {_KEYS.format('public')}: {error}") from error
    read_bounded(path, _MAX_SIGNATURE, "signature", follow=False)
    try:
        config.set_hashing_config(_hashing()).verify(folder, path)
    except Exception as error:  # on a file that is no signature it raises whatever it runs into
        reason = str(error) or type(error).__name__
        raise InputRejected(f"{path}: is not a signature of this folder by {public_key.name}: {reason}") from error


_KEYS = "is not a {} key for P-256, P-384 or P-521 in PEM, without a password"


def _signer(key: Path) -> Any:
    signing, _ = _libraries()
    _read_key(key, "--sign")
    try:
        return signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:
        raise UsageError(f"--sign {key}: {_KEYS.format('private')}: {error}") from error


def _read_key(key: Path, option: str) -> None:
    try:
        read_bounded(key, _MAX_KEY, "key")
    except InputRejected as error:
        raise UsageError(f"{option} {error}") from error


def _hashing() -> Any:
    """Every file but the signature, those of git too; links are refused."""
    from model_signing import hashing

    return hashing.Config().use_file_serialization().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _libraries() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        missing = error.name or "model_signing"
        raise Unavailable(f"{missing} is not installed, which signatures need: {install_command('signing')}") from error
    return signing, verifying
