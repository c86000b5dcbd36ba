"""The stage cache: what a stage made is kept under a key of everything that went into it, and never half-written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from patchslim.errors import Unavailable


class StageCache:
    """Folders ``ROOT/STAGE-KEY``; each is whole or absent, so that a killed run resumes at the stage it was in."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, stage: str, /, **inputs: object) -> Path:
        """The folder of ``stage`` for these inputs, whether it is there or not."""
        text = json.dumps({"code": code_digest(), **inputs}, sort_keys=True, default=str)
        return self.root / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

    def make(self, folder: Path, build: Callable[[Path], None]) -> bool:
        """Have ``build`` fill ``folder`` unless it is there; returns whether it had to. A failed build leaves nothing."""
        if folder.is_dir():
            return False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=self.root))
        except OSError as error:
            raise Unavailable(f"{self.root}: the work folder cannot be written: {error}; pass --work DIR") from error
        try:
            build(part)
            try:
                part.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another run was faster: its folder holds the same
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return True


def code_digest() -> str:
    """SHA-256 over this project's code and its libraries' versions: a stage made by other code is made again."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for room in ("export", "graph_passes", "patchslim", "slimming", "validate"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(json.dumps(tool_versions()).encode())
    return digest.hexdigest()


def tool_versions() -> dict[str, str]:
    """Installed versions of everything whose version can change a bundle."""
    ours = ("patchslim", "matplotlib", "numpy", "pillow", "scikit-learn", "timm", "torch", "torchvision")
    onnx = ("onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "onnxscript")
    versions = {}
    for name in (*ours, *onnx, "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
