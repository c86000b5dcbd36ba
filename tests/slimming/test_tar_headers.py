"""Headers of plain tar files: names, offsets and sizes as tarfile has them, in each of its formats."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from slimming.data.tar_headers import regular_files


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"])
def test_headers_are_read_as_tarfile_reads_them(tmp_path: Path, form: int) -> None:
    path, rng = tmp_path / "shard.tar", random.Random(3)
    names = ["a.jpg", "d" * 90 + "/" + "e" * 70 + ".jpg", "sub/ü.cls", "__meta__/x.json"]
    names += [] if form == tarfile.USTAR_FORMAT else ["x/" * 150 + "long.jpg", "ü" * 120 + ".jpg"]
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = rng.choice([0, 1, 511, 512, 513, 3000])
            tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
                other = tarfile.TarInfo(f"{name}{int(kind)}"[-90:])
                other.type, other.linkname = kind, "y" * (90 if form == tarfile.USTAR_FORMAT else 150)
                tar.addfile(other)
    with tarfile.open(path) as tar:
        wanted = [(member.name, (member.offset_data, member.size)) for member in tar if member.isreg()]
    with open(path, "rb") as file:
        assert list(regular_files(file)) == wanted
    assert [name for name, _ in wanted] == names


def test_a_size_in_the_extended_header_or_in_binary_counts(tmp_path: Path) -> None:
    content = b"five" * 50
    info = tarfile.TarInfo("a.png")
    info.size, info.pax_headers = len(content), {"size": str(len(content))}
    header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    header[-512 + 124 : -512 + 136] = b"0" * 11 + b"\0"  # the plain header says 0, as it does where the size does not fit
    binary = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.GNU_FORMAT))
    binary[124:136] = b"\x80" + len(content).to_bytes(11, "big")
    for block in (memoryview(header)[-512:], memoryview(binary)):
        block[148:156] = b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256)
    padded = content + bytes(-len(content) % 512)
    (tmp_path / "a.tar").write_bytes(header + padded + binary + padded + bytes(1024))
    with open(tmp_path / "a.tar", "rb") as file:
        found = list(regular_files(file))
    assert [(name, size) for name, (_, size) in found] == [("a.png", len(content)), ("b.png", len(content))]
    assert all((tmp_path / "a.tar").read_bytes()[at : at + size] == content for _, (at, size) in found)


@pytest.mark.parametrize(
    ("kind", "content", "fault"),
    [
        (tarfile.GNUTYPE_SPARSE, b"", "is sparse"),
        (tarfile.XHDTYPE, b"22 GNU.sparse.major=1\n", "sparse file"),
        (tarfile.XGLTYPE, b"10 path=a\n", "names all files alike"),
        (tarfile.XHDTYPE, b"99 path=a\n", "not a pax header"),
        (tarfile.XHDTYPE, b"0 path=a\n", "not a pax header"),
        (tarfile.XHDTYPE, b"path=a\n", "not a pax header"),
        (tarfile.XHDTYPE, b"11 size=-1\n", "not a number"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, kind: bytes, content: bytes, fault: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a")
        info.type, info.size = kind, len(content)
        tar.addfile(info, io.BytesIO(content))
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(ValueError, match=fault):
        list(regular_files(file))


def test_every_flipped_header_byte_is_met(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("a.png", "b.png"):
            info = tarfile.TarInfo(name)
            info.size = 600
            tar.addfile(info, io.BytesIO(bytes(600)))
    whole = (tmp_path / "a.tar").read_bytes()
    start = whole.index(b"b.png")
    for place in range(start, start + 512, 7):
        (tmp_path / "a.tar").write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        with open(tmp_path / "a.tar", "rb") as file, pytest.raises(ValueError, match=f"at byte {start}"):
            list(regular_files(file))
