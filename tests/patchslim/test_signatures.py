"""A folder's signature: made and checked by OpenSSF model signing, with keys of one's own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from patchslim.errors import InputRejected, UsageError
from patchslim.signatures import SIGNATURE, check_private_key, sign_folder, verify_folder
from tests.helpers.signing_keys import write_keys

pytest.importorskip("model_signing")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "signed"
    (made / "inside").mkdir(parents=True)
    (made / "a.txt").write_text("a")
    (made / ".gitignore").write_text("b")
    (made / "inside" / "c").write_text("c")
    return made


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_a_signature_holds_wherever_the_folder_is(curve: ec.EllipticCurve, folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, curve)
    check_private_key(private)
    sign_folder(folder, private)
    moved = folder.rename(tmp_path / "elsewhere")
    verify_folder(moved, public)


def changed(folder: Path) -> None:
    (folder / "inside" / "c").write_text("d")


def added(folder: Path) -> None:
    (folder / "d.txt").write_text("")


def removed(folder: Path) -> None:
    (folder / ".gitignore").unlink()


def linked(folder: Path) -> None:
    (folder / "a.txt").rename(folder.with_name("a.txt"))
    (folder / "a.txt").symlink_to(folder.with_name("a.txt"))


def unsigned(folder: Path) -> None:
    (folder / SIGNATURE).unlink()


def written(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / SIGNATURE).write_bytes(data)  # type: ignore[return-value]


DAMAGES = [
    changed,
    added,
    removed,
    linked,
    unsigned,
    *map(written, (b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b"0" * (17 << 20))),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_changed_is_refused(damage: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    sign_folder(folder, private)
    damage(folder)
    with pytest.raises(InputRejected, match=r"model\.sig"):
        verify_folder(folder, public)


def test_another_key_is_refused(folder: Path, tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    (tmp_path / "stranger").mkdir()
    _, stranger = write_keys(tmp_path / "stranger")
    sign_folder(folder, private)
    with pytest.raises(InputRejected, match="is not a signature of this folder by"):
        verify_folder(folder, stranger)


def test_what_is_no_key(folder: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    sign_folder(folder, private)
    (tmp_path / "text").write_text("no key")
    other = ed25519.Ed25519PrivateKey.generate()
    plain, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "ed25519").write_bytes(other.private_bytes(plain, pkcs8, serialization.NoEncryption()))
    locked = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "locked").write_bytes(locked.private_bytes(plain, pkcs8, serialization.BestAvailableEncryption(b"x")))
    for name in ("text", "ed25519", "locked", "nowhere"):
        with pytest.raises(UsageError, match=f"--sign .*{name}"):
            check_private_key(tmp_path / name)
        with pytest.raises(UsageError, match=f"--public-key .*{name}"):
            verify_folder(folder, tmp_path / name)
    with pytest.raises(UsageError, match="--sign"):
        check_private_key(public)
    with pytest.raises(UsageError, match="--public-key"):
        verify_folder(folder, private)


def test_without_model_signing_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from pathlib import Path\n"
        "from patchslim.signatures import check_private_key\n"
        "from patchslim.errors import Unavailable\n"
        "try: check_private_key(Path('key.pem'))\n"
        "except Unavailable as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 'model_signing is not installed, which signatures need: pip install ".[signing]"' in done.stdout, done.stderr


@pytest.mark.slow
def test_model_signings_own_command_checks_it(folder: Path, tmp_path: Path) -> None:
    (folder / ".gitignore").unlink()  # which that command leaves out unless told otherwise
    private, public = write_keys(tmp_path)
    sign_folder(folder, private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / SIGNATURE), "--public_key", str(public)]
    assert subprocess.run(command, capture_output=True).returncode == 0
    changed(folder)
    assert subprocess.run(command, capture_output=True).returncode != 0
