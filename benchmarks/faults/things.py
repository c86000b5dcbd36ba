"""What the commands make, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from benchmarks.faults.processes import Door

State = Literal["whole", "half", "missing"]
_MODEL = ["--model", "vit_tiny_patch16_224", "--weights", "random", "--device", "cpu"]
_MODEL += [text for pair in ("img_size=48", "depth=2", "embed_dim=48", "num_heads=3") for text in ("--model-arg", pair)]
_IMAGES = ["--calibration-images", "16"]


@dataclass(frozen=True)
class Thing:
    """One door and what it makes at one place; every second run makes another, over the earlier one."""

    name: str
    folder: Path  # everything that its runs write: what they make, and the work folder
    path: Path  # what is made, or for validate, read

    def door(self, number: int, *, cold: bool = False) -> Door:
        """The command of run ``number``; a ``cold`` one finds nothing in the work folder."""
        reduction = ["--macs-reduction", ("0.2", "0.35")[number % 2]]
        seed = ["--seed", str(1000 + number if cold else 8)]
        if self.name == "export":
            # Without a stage that does nothing but wait for a clock: most moments would fall into it.
            gate = [
                "--eval-images",
                "16",
                "--max-top1-drop",
                "100",
                "--no-measure-latency",
                "--work",
                str(self.folder / "work"),
            ]
            return Door("export.run", [*_MODEL, *_IMAGES, *reduction, *seed, *gate, "-o", str(self.path)])
        if self.name == "slim":
            return Door("slimming.run", [*_MODEL, *_IMAGES, *reduction, *seed, "-o", str(self.path)])
        if self.name == "cut":
            source = ["--plan", str(self.folder.parent / "given" / "plan.json"), "--precision", ("fp32", "fp16")[number % 2]]
            return Door("graph_passes.run", [str(self.folder.parent / "given" / "dense.onnx"), *source, "-o", str(self.path)])
        return Door("validate.run", [str(self.path), "--threads", "1"])

    def state(self) -> State:
        """Whether what is there is whole."""
        if not self.path.exists():
            return "missing"
        if self.name in ("export", "validate"):
            return bundle_state(self.path)
        return _plan_state(self.path) if self.name == "slim" else _onnx_state(self.path)

    def leftovers(self) -> list[str]:
        """Files that a run made for itself and did not take away; locks stay, since to take one away is a race."""
        hidden = (path for path in self.folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".part"))
        return sorted(str(path.relative_to(self.folder)) for path in hidden if not path.name.endswith(".lock"))


def bundle_state(folder: Path) -> State:
    """Whether a bundle's manifest is there and every file is as it says; read again where it was replaced meanwhile."""
    while True:
        try:
            text = (folder / "manifest.json").read_bytes()
        except OSError:
            return "missing"
        try:
            files = json.loads(text)["files"]
            digests = {one["path"]: one["sha256"] for one in files}
            whole = all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digests[name] for name in digests)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if whole:
            return "whole"
        if (folder / "manifest.json").exists() and (folder / "manifest.json").read_bytes() == text:
            return "half"


def _plan_state(path: Path) -> State:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from patchslim.errors import InputRejected
    from patchslim.plan import load_plan
    from slimming.models.weights import state_digest

    try:
        plan = load_plan(path)
        named = plan.weights
        if not named or not named.file or state_digest(load_file(path.with_name(named.file))) == named.sha256:
            return "whole"
    except (InputRejected, OSError, SafetensorError):
        pass
    return "half"


def _onnx_state(path: Path) -> State:
    import onnx

    try:
        onnx.checker.check_model(onnx.load(path))
    except Exception:  # whatever protobuf makes of half a file
        return "half"
    return "whole"


def size_of(path: Path) -> int:
    """Bytes of a folder's files, or of a file and what lies beside it under the same stem, as its weights do."""
    return sum(one.stat().st_size for one in _files(path))


def largest_file(path: Path) -> int:
    """Bytes of the largest file that ``size_of`` counts."""
    return max(one.stat().st_size for one in _files(path))


def _files(path: Path) -> list[Path]:
    found = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.stem}[.-]*")
    return [one for one in found if one.is_file()]


class SmallDisk:
    """A file system of its own at ``folder`` (tmpfs), or, without ``mounts``, an ordinary folder there."""

    _ROOM = 1 << 30  # bytes, before ``leave`` says how many

    def __init__(self, folder: Path, *, mounts: bool) -> None:
        self.folder, self.mounts = folder, mounts

    @classmethod
    def may_mount(cls, folder: Path) -> bool:
        """Whether this user may mount one, tried at ``folder``."""
        folder.mkdir(parents=True)
        try:
            return cls._mount("-t", "tmpfs", "-o", f"size={cls._ROOM}", "tmpfs", str(folder))
        finally:
            subprocess.run(["umount", str(folder)], capture_output=True, check=False)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        if self.mounts and not self._mount("-t", "tmpfs", "-o", f"size={self._ROOM}", "tmpfs", str(self.folder)):
            raise OSError(f"{self.folder}: no tmpfs can be mounted any more")
        return self

    def leave(self, free: int) -> None:
        """Leave ``free`` bytes of room beside what lies there now."""
        if not self.mounts:
            return
        used = os.statvfs(self.folder)
        size = (used.f_blocks - used.f_bfree) * used.f_frsize + free
        if not self._mount("-o", f"remount,size={size}", str(self.folder)):
            raise OSError(f"{self.folder}: cannot be made smaller")

    def __exit__(self, *raised: object) -> None:
        if self.mounts:
            subprocess.run(["umount", str(self.folder)], capture_output=True, check=False)

    @staticmethod
    def _mount(*arguments: str) -> bool:
        try:
            return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False
