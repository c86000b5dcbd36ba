"""A model file opened in its engine, from exactly the bytes that were checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from patchslim.errors import InputRejected
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.runner import Runner

if TYPE_CHECKING:
    from patchslim.runner import TensorInfo


class Model(Runner, Protocol):
    """What runs here: a runner that says what it takes and gives."""

    @property
    def inputs(self) -> list[TensorInfo]:
        """The input."""

    @property
    def outputs(self) -> list[TensorInfo]:
        """The outputs, logits first."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    @property
    def dtype(self) -> Any:
        """NumPy's type of the input."""

    def close(self) -> None:
        """Give its memory back; it cannot be run afterwards."""


def open_model(task: Mapping[str, Any]) -> Model:
    """The model in its engine, from the bytes that were checked: in memory, or in a folder of its own with its weights.

    ``task`` has ``backend`` (a module), ``folder`` and ``path`` of the file, ``files`` (path, size and SHA-256 of all that may
    be read; None: the file is taken as it is), ``private`` (a folder to copy weights to), ``provider``, ``threads``,
    ``openvino`` (its settings by name), ``weights`` (``folder``, ``path`` and ``files`` of the ONNX file that an engine
    without weights is given them from; None: it has its own) and ``cache`` (a folder for what TensorRT-RTX compiles; None: it
    is not kept). Raises ``InputRejected`` where a file is another one or does not run, ``Unavailable`` where the engine is not
    here.
    """
    from patchslim.files import read_verified

    if task["backend"] in ("tensorrt", "tensorrt_rtx"):
        from patchslim.tensorrt_runner import TrtRunner

        path = Path(task["folder"]) / task["path"]
        engine = read_verified(path, *_listed(task, task["path"]))
        weights = None if task["weights"] is None else _verified_onnx(task["weights"], Path(task["private"]))
        return TrtRunner(engine, task["backend"], name=str(path), weights=weights, cache=task["cache"])
    if task["path"].endswith(".xml"):
        return _opened_ir(task)
    path = Path(task["folder"]) / task["path"]
    if task["files"] is None:
        from validate.onnx_file import check_onnx

        check_onnx(path)
        return _loaded(path, str(path), task)
    return _loaded(_verified_onnx(task, Path(task["private"])), str(path), task)


def _verified_onnx(task: Mapping[str, Any], private: Path) -> Path | bytes:
    """The ONNX file that ``folder``, ``path`` and ``files`` of ``task`` name, as it was checked.

    Its bytes where they hold all its weights, else a copy in the folder ``private`` with its weights beside it.
    """
    from patchslim.files import copy_verified, read_verified
    from validate.onnx_file import beside, check_onnx_bytes

    folder, name = Path(task["folder"]), task["path"]
    files = {path: (size, sha256) for path, size, sha256 in task["files"]}
    inside = beside(name, files)
    data = read_verified(folder / name, *files[name])
    needed = check_onnx_bytes(data, folder / name, set(inside))
    if not needed:
        return data
    for location in needed:
        to = private / location
        to.parent.mkdir(parents=True, exist_ok=True)
        copy_verified(folder / inside[location], *files[inside[location]], to)
    model = private / f"{hashlib.sha256(data).hexdigest()}.onnx"
    model.write_bytes(data)
    return model


def _listed(task: Mapping[str, Any], path: str) -> tuple[int, str]:
    """Size and digest that a file must have; raises ``InputRejected`` where the record of the folder lacks it."""
    for name, size, sha256 in task["files"]:
        if name == path:
            return size, sha256
    raise InputRejected(f"{Path(task['folder']) / path}: is not listed, and the model needs it")


def _opened_ir(task: Mapping[str, Any]) -> Model:
    """An OpenVINO IR from the bytes of its two files that were checked."""
    from patchslim.files import read_verified
    from patchslim.openvino_runner import OpenVinoRunner

    folder = Path(task["folder"])
    names = task["path"], task["path"].removesuffix(".xml") + ".bin"
    xml, weights = (read_verified(folder / name, *_listed(task, name)) for name in names)
    path = str(folder / task["path"])
    return OpenVinoRunner(xml, _settings(task), weights=weights, name=path)


def _settings(task: Mapping[str, Any]) -> OpenVinoSettings:
    return OpenVinoSettings(task["openvino"]["precision"], task["openvino"]["hint"], task["threads"])


def _loaded(model: Path | bytes, name: str, task: Mapping[str, Any]) -> Model:
    """An ONNX model in the engine that is asked for."""
    if task["backend"] == "openvino":
        from patchslim.openvino_runner import OpenVinoRunner

        return OpenVinoRunner(model, _settings(task), name=name)
    from patchslim.ort_runner import OrtRunner

    return OrtRunner(model, name=name, provider=task["provider"], threads=task["threads"])
