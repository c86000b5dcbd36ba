"""Attacks on a bundle's folder: paths, links, special files, sizes, and bytes that are not what the manifest lists."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

from tests.helpers.attacks.bundles import add, attack, edit, in_manifest, replaced, seal

ZEROS = "0" * 64


def listed(path: str, size: int = 0) -> Any:
    """List one more file in the manifest."""
    return in_manifest(lambda record: record["files"].append({"path": path, "size": size, "sha256": ZEROS}))


def _damaged(name: str, change: Any) -> Any:
    def damage(bundle: Path) -> None:
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(change(data))

    return damage


for _name in ("model.onnx", "plan.json", "golden.npz", "parity.json", "golden/0.png"):
    add(f"{_name} cut off", 3, (_name, "truncated"), _damaged(_name, lambda data: data[: len(data) // 2]))
    _flip = _damaged(_name, lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:])
    add(f"{_name} with a flipped bit", 3, (_name, "SHA-256"), _flip)
    add(f"{_name} empty", 3, (_name, "0 bytes"), _damaged(_name, lambda data: b""))
    add(f"{_name} missing", 3, (_name, "missing"), lambda bundle, name=_name: (bundle / name).unlink())  # type: ignore[misc]

for _path in ("../outside", "/etc/passwd", "a/../../b", "a//b", "C:x", "a\\b", "", ".", "a\nb", "\x1b[2J", "x" * 513):
    add(f"a path {_path[:20]!r}", 3, ("manifest.json", "files.", ".path", "plain relative path"), listed(_path))

add("an unlisted file", 3, ("sub/extra.bin", "not listed"), replaced("sub/extra.bin", b"x", sealed=False))
add("a listed file that is not there", 3, ("sub/x", "missing"), listed("sub/x"))
add("a file twice in two letter cases", 3, ("listed twice",), listed("Model.ONNX"))
add("a manifest that lists itself", 3, ("lists itself",), listed("manifest.json"))
for _path in ("HIDDEN.ONNX", "deep/er/b.Onnx"):
    add(f"an unrecorded {_path}", 3, (f"onnx: lacks {_path}",), replaced(_path, b"any"))
add("a file whose name is not UTF-8", 3, ("not listed",), lambda bundle: (bundle / os.fsdecode(b"\xff.bin")).touch())
add("a file named by control characters", 3, ("plain relative path",), lambda bundle: (bundle / "a\x1b[2Jb").touch())


@attack(3, "model.onnx", "link")
def a_link_out_of_the_bundle(bundle: Path) -> None:
    shutil.move(bundle / "model.onnx", bundle.parent / "model.onnx")
    (bundle / "model.onnx").symlink_to(bundle.parent / "model.onnx")


add("a linked folder", 3, ("folder", "link"), lambda bundle: (bundle / "folder").symlink_to(bundle.parent))
add("a link to itself", 3, ("loop", "link"), lambda bundle: (bundle / "loop").symlink_to("loop"))
add("a pipe", 3, ("pipe", "special file"), lambda bundle: os.mkfifo(bundle / "pipe"))


add("a socket", 3, ("socket", "special file"), lambda bundle: os.mknod(bundle / "socket", stat.S_IFSOCK | 0o600))


@attack(3, "manifest.json", "link, not a regular file")
def a_manifest_that_is_a_link(bundle: Path) -> None:
    shutil.move(bundle / "manifest.json", bundle.parent / "manifest.json")
    (bundle / "manifest.json").symlink_to(bundle.parent / "manifest.json")


@attack(3, "manifest.json: is not a regular file")
def a_manifest_that_is_a_pipe(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")


@attack(3, "manifest.json", "directory")
def a_manifest_that_is_a_folder(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()
    (bundle / "manifest.json").mkdir()


add("a link to a device for the manifest", 3, ("manifest.json",), lambda bundle: _link(bundle / "manifest.json", "/dev/zero"))


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


@attack(3, "manifest.json: not a valid manifest: has more than the 8388608 bytes allowed")
def a_manifest_of_more_than_8_mib(bundle: Path) -> None:
    with (bundle / "manifest.json").open("a") as file:
        file.write(" " * (8 << 20))


def sparse(path: Path, size: int) -> None:
    """A file of ``size`` bytes that has none of them on the disk."""
    with path.open("wb"):
        os.truncate(path, size)


@attack(3, "truncated or replaced")
def a_sparse_file_of_8_tib_said_to_be_small(bundle: Path) -> None:
    sparse(bundle / "kept.png", 1 << 43)
    listed("kept.png", 1000)(bundle)


@attack(3, "bytes, more than the", "allowed")
def a_sparse_file_of_8_tib(bundle: Path) -> None:
    sparse(bundle / "kept.png", 1 << 43)
    listed("kept.png", 1 << 43)(bundle)


@attack(3, "plan.json", "more than the 67108864 allowed")
def a_plan_of_more_than_64_mib(bundle: Path) -> None:
    sparse(bundle / "plan.json", (64 << 20) + 1)
    seal(bundle)


@attack(3, "golden.npz", "more than the")
def golden_arrays_of_more_than_any_bundle_has(bundle: Path) -> None:
    sparse(bundle / "golden.npz", 64 << 20)
    seal(bundle)


@attack(3, "parity.json", "more than the 8388608 allowed")
def a_parity_report_of_more_than_8_mib(bundle: Path) -> None:
    sparse(bundle / "parity.json", (8 << 20) + 1)
    seal(bundle)


@attack(3, "holds more than 10000 files and folders", slow=True)
def ten_thousand_files(bundle: Path) -> None:
    for number in range(10_001):
        (bundle / f"{number}").touch()


RTX = b"vtrt\0\0\0\0\2\0\0\0\0\0\0\0"


def engine(backend: str, data: bytes) -> Any:
    """Put an engine file of ``data`` into the bundle, said to be for ``backend``."""

    def damage(bundle: Path) -> None:
        (bundle / "engine").mkdir()
        (bundle / "engine" / "a.engine").write_bytes(data)
        fields = {"backend": backend, "targets": ["sm80"], "files": ["engine/a.engine"]}
        for name in ("parity.json", "manifest.json"):
            edit(bundle / name, lambda record: record["engine"].update(fields))
        seal(bundle)

    return damage


for _backend, _data, _fault in (
    ("tensorrt_rtx", b"", "is empty"),
    ("tensorrt_rtx", b"ftrt" + bytes(36), "no engine of tensorrt_rtx"),
    ("tensorrt-rtx", b"ftrt" + bytes(36), "no engine of tensorrt-rtx"),
    ("tensorrt_rtx", b"\x7fELF" + bytes(36), "no engine of tensorrt_rtx"),
    ("tensorrt_rtx", RTX + (80).to_bytes(8, "little") + bytes(16), "has 40 bytes, and its header says 80"),
    ("tensorrt", b"MZ" + bytes(38), "no engine of tensorrt"),
    ("tensorrt", b"ftrt", "no engine of tensorrt"),
    ("openvino", b"", "is empty"),
):
    add(f"an engine {_data[:4]!r} of {len(_data)} bytes for {_backend}", 3, ("a.engine", _fault), engine(_backend, _data))
