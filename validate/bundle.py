"""A bundle's records, written and read: digests, the file list, ``manifest.json`` and ``parity.json``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from patchslim.errors import InputRejected
from patchslim.files import digest, read_bounded, read_verified
from patchslim.records import atomic_path, parse_record, save_record
from patchslim.signatures import SIGNATURE
from validate.fields import plain_path
from validate.manifest import FileRecord, Manifest
from validate.parity_records import ParityReport

MANIFEST = "manifest.json"
PARITY = "parity.json"
PLAN = "plan.json"
LATENCY = "latency.json"
SBOM = "sbom.cdx.json"
#: For ``sha256sum -c``: every file but itself, the manifest too.
SUMS = "SHA256SUMS"
GOLDEN = "golden.npz"
#: Files that the manifest does not list: itself, and what has its digest.
UNLISTED = frozenset({MANIFEST, SUMS, SIGNATURE})
#: A manifest or parity report of more bytes is refused.
MAX_RECORD_BYTES = 8 << 20
_MAX_FILES = 10_000


def list_files(folder: Path) -> list[str]:
    """Plain relative paths of every file under ``folder``, sorted; raises ``InputRejected``.

    Links, devices, pipes and sockets are refused, whatever they point to: a bundle is folders and regular files.
    """
    names: list[str] = []
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            for entry in os.scandir(current):
                path = current / entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_file(follow_symlinks=False):
                    names.append(plain_path(path.relative_to(folder).as_posix()))
                else:
                    raise InputRejected(f"{path}: is a link or a special file; a bundle holds regular files and folders only")
        except (OSError, ValueError) as error:
            raise InputRejected(f"{current}: cannot be read as a bundle's folder: {error}") from error
        if len(names) + len(waiting) > _MAX_FILES:
            raise InputRejected(f"{folder}: holds more than {_MAX_FILES} files and folders")
    return sorted(names)


def record_files(folder: Path) -> list[FileRecord]:
    """Records of every file under ``folder`` but those that the manifest does not list, sorted by path.

    Raises ``InputRejected``.
    """
    return [
        FileRecord(path=name, size=(folder / name).stat().st_size, sha256=digest(folder / name))
        for name in list_files(folder)
        if name not in UNLISTED
    ]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` whole or not at all, last of the bundle's files; raises ``OSError``."""
    save_record(folder / MANIFEST, manifest)


def write_parity(folder: Path, report: ParityReport) -> None:
    """Write ``parity.json`` whole or not at all; raises ``OSError``."""
    save_record(folder / PARITY, report)


def write_sums(folder: Path, manifest: Manifest) -> None:
    """Write ``SHA256SUMS`` whole or not at all, after the manifest; raises ``OSError``."""
    with atomic_path(folder / SUMS) as part:
        part.write_bytes(expected_sums(folder, manifest))


def expected_sums(folder: Path, manifest: Manifest) -> bytes:
    """What ``SHA256SUMS`` must hold: a line for ``manifest.json`` as it is and for every file that it lists, sorted by path.

    Raises ``InputRejected`` where the manifest cannot be read.
    """
    data = read_bounded(folder / MANIFEST, MAX_RECORD_BYTES, "manifest", follow=False)
    sums = {record.path: record.sha256 for record in manifest.files} | {MANIFEST: hashlib.sha256(data).hexdigest()}
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def sums_fault(folder: Path, manifest: Manifest) -> str:
    """What is wrong with the folder's ``SHA256SUMS``; "" where it says what the manifest does. Raises ``InputRejected``."""
    wanted = expected_sums(folder, manifest)
    if read_bounded(folder / SUMS, len(wanted), "SHA256SUMS", follow=False) != wanted:
        return f"{folder / SUMS}: is not the digests of {MANIFEST} and of the files that it lists"
    return ""


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; raises ``InputRejected`` naming the file and the fault."""
    return read_manifest(folder)[0]


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """``load_manifest``, and the SHA-256 of the bytes that it was read from."""
    path = folder / MANIFEST
    data = read_bounded(path, MAX_RECORD_BYTES, "manifest", follow=False)
    return parse_record(data, Manifest, "manifest", path), hashlib.sha256(data).hexdigest()


def load_parity(folder: Path) -> ParityReport:
    """Read and check ``parity.json``; raises ``InputRejected`` naming the file and the fault."""
    return parse_parity(folder, read_bounded(folder / PARITY, MAX_RECORD_BYTES, "parity report", follow=False))


def parse_parity(folder: Path, data: bytes) -> ParityReport:
    """``load_parity`` of bytes that were read already."""
    return parse_record(data, ParityReport, "parity report", folder / PARITY)


def read_file(folder: Path, manifest: Manifest, name: str, limit: int) -> bytes:
    """The bytes of a file of the bundle, if they are those that the manifest lists and at most ``limit``.

    Raises ``InputRejected`` naming the file and the fault.
    """
    record = next(file for file in manifest.files if file.path == name)
    if record.size > limit:
        raise InputRejected(f"{folder / name}: has {record.size} bytes, more than the {limit} allowed")
    return read_verified(folder / name, record.size, record.sha256)
