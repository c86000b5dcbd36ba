"""Valid files, made on the fly, that inputs are mutated from: each as small as its format allows."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import pickle
import struct
import tarfile
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from benchmarks.fuzz.bundles import MODEL, SIZE, make_bundle
from benchmarks.fuzz.bundles import plan as bundle_plan
from patchslim.latency_table import LatencyPoint, LatencyTable
from patchslim.macs import Geometry
from patchslim.plan import Calibration, FittedWeights, Origin, SlimPlan

GEOMETRY = Geometry(embed_dim=8, mlp_hidden_dim=16, patch_macs=100, head_macs=48)
_VIT = """
vit (float[batch, 3, 8, 8] images) => (float[batch, 3] logits) {
  grid = Conv <kernel_shape = [4, 4], strides = [4, 4]> (images, patch)  rows = Reshape(grid, flat)
  x = Transpose <perm = [0, 2, 1]> (rows)  n = LayerNormalization <axis = -1> (x, scale, bias)
  q = MatMul(n, wq)  k = MatMul(n, wk)  kt = Transpose <perm = [0, 2, 1]> (k)  v = MatMul(n, wv)
  s = MatMul(q, kt)  p = Softmax <axis = -1> (s)  a = MatMul(p, v)  y = Add(x, a)
  m = ReduceMean <keepdims = 0> (y, one)  logits = MatMul(m, head)
}
"""


def plan() -> SlimPlan:
    """The plan of ``bundles``, but one that merges, with every optional field set."""
    calibration = Calibration(data="digits", images=4, fingerprint="0" * 64)
    origin = Origin(
        score="paper", criterion="manual", value=0.0, tolerance=0.1, calibration=calibration, errors=[0.0, 0.1, 0.2]
    )
    weights = FittedWeights(file="w.safetensors", sha256="0" * 64, fit="sgd", finetune={"epochs": 1, "lr": 0.1, "a": "b"})
    more = {"merged_into": [-1, 2, -1, -1, 3], "origin": origin, "weights": weights}
    return SlimPlan.model_validate({**dict(bundle_plan()), **more})


def latency_table() -> LatencyTable:
    """A table of three points."""
    return LatencyTable(
        model=MODEL,
        tokens=5,
        depth=3,
        geometry=GEOMETRY,
        mode="compact",
        layout="split",
        engine="ort",
        engine_version="1",
        precision="fp32",
        device="cpu",
        threads=1,
        batch=1,
        points=[LatencyPoint(tokens_in=n, tokens_out=k, ms=float(n + k)) for n, k in ((5, 5), (5, 3), (3, 3))],
        fixed_ms=1.0,
        dense_ms=31.0,
        repeats=3,
        spread=0.1,
    )


@cache
def bundle() -> dict[str, bytes]:
    """The files of a bundle that passes every check."""
    with tempfile.TemporaryDirectory() as folder:
        made = make_bundle(
            Path(folder) / "bundle",
            model_args={"img_size": SIZE},
            target={"device": "cpu"},
        )
        return files_of(made)


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative paths and bytes of everything in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def sealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """A bundle's files with a manifest whose sizes and digests are theirs, as one who tampers carefully leaves them."""
    manifest = json.loads(files["manifest.json"])
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # a recipe that was tampered with past mending
        recipe = json.loads(files["recipe.json"])
        recipe["onnx"] |= _record(recipe["onnx"]["path"], files[recipe["onnx"]["path"]])
        files = files | {"recipe.json": json.dumps(recipe).encode()}
    manifest["plan_digest"] = hashlib.sha256(files["plan.json"]).hexdigest()
    manifest["files"] = [_record(name, data) for name, data in sorted(files.items()) if name != "manifest.json"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


def _record(name: str, data: bytes) -> dict[str, Any]:
    return {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@cache
def vit() -> bytes:
    """An ONNX Vision Transformer of one block and one head."""
    rng = np.random.default_rng(0)
    graph = onnx.parser.parse_graph(_VIT)
    shapes = {"patch": (8, 3, 4, 4), "scale": (8,), "bias": (8,), "head": (8, 3), "wq": (8, 8), "wk": (8, 8), "wv": (8, 8)}
    for name, shape in shapes.items():
        graph.initializer.append(numpy_helper.from_array(rng.normal(0, 0.5, shape).astype(np.float32), name))
    for name, values in {"flat": [0, 8, 4], "one": [1]}.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.int64), name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@cache
def external_vit() -> dict[str, bytes]:
    """The same with its weights in ``model.data``."""
    model, data = onnx.load_from_string(vit()), b""
    for tensor in model.graph.initializer:
        if not tensor.raw_data or tensor.data_type != TensorProto.FLOAT:
            continue
        for key, value in (("location", "model.data"), ("offset", len(data)), ("length", len(tensor.raw_data))):
            tensor.external_data.add(key=key, value=str(value))
        data += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    return {"model.onnx": bytes(model.SerializeToString()), "model.data": data}


@cache
def safetensors_header() -> tuple[str, bytes]:
    """The JSON header of a small safetensors file, and what follows it."""
    tensors = {
        "a.weight": ("F32", [2, 3], 24),
        "b.bias": ("F16", [4], 8),
        "c": ("I64", [1], 8),
        "d": ("BF16", [2], 4),
        "e": ("BOOL", [3], 3),
    }
    header: dict[str, Any] = {"__metadata__": {"patchslim": json.dumps({"labels": ["a"], "data_config": {"mean": [0.5]}})}}
    end = 0
    for name, (kind, shape, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return json.dumps(header), bytes(end)


def safetensors(header: bytes, data: bytes) -> bytes:
    """A safetensors file of these parts."""
    return struct.pack("<Q", len(header)) + header + data


@cache
def checkpoints() -> tuple[bytes, ...]:
    """Checkpoints of PyTorch: a plain state dict, one with what training leaves beside it, and one in the old format."""
    import argparse
    from collections import OrderedDict

    import torch

    state = OrderedDict(a=torch.ones(2, 3), b=torch.zeros(4, dtype=torch.float16), c=torch.arange(3), d=torch.ones(2, 2).t())
    trained = {"state_dict": state, "epoch": 3, "arch": "vit", "args": argparse.Namespace(lr=0.1), "metric": np.float64(1)}
    made = []
    for value, modern in ((state, True), ({**trained, "args": None, "metric": 1.0}, True), (trained, True), (state, False)):
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=modern)
        made.append(buffer.getvalue())
    made.append(pickle.dumps({"a": [1.0]}, protocol=2))
    return tuple(made)


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of an archive that is to be written."""

    name: str
    data: bytes


def unzipped(data: bytes) -> list[Member]:
    """The members of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Member(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def zipped(members: list[Member], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive with right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for member in members:
            archive.writestr(zipfile.ZipInfo(member.name), member.data, compression)
    return buffer.getvalue()


@cache
def images() -> tuple[tuple[str, bytes], ...]:
    """Pictures of every format that is read: (suffix, bytes)."""

    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    made: list[tuple[str, bytes]] = []
    for suffix, kind, mode in (
        ("png", "PNG", "RGB"), ("png", "PNG", "P"), ("png", "PNG", "RGBA"), ("png", "PNG", "L"), ("jpg", "JPEG", "RGB"),
        ("jpeg", "JPEG", "CMYK"), ("bmp", "BMP", "RGB"), ("ppm", "PPM", "RGB"), ("tif", "TIFF", "RGB"), ("webp", "WEBP", "RGB"),
    ):  # fmt: skip
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind)
        made.append((suffix, buffer.getvalue()))
    for suffix, kind, options in (("tiff", "TIFF", {"compression": "tiff_lzw"}), ("jpg", "JPEG", {"progressive": True})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        made.append((suffix, buffer.getvalue()))
    sixteen = io.BytesIO()
    Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(sixteen, "PNG")
    return (*made, ("png", sixteen.getvalue()))


@cache
def shards() -> tuple[bytes, ...]:
    """Tar files of samples: of the formats ustar, GNU and pax, with long names, classes in ``.cls`` and in ``.json``."""
    png = images()[0][1]
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            long = "" if form == tarfile.USTAR_FORMAT else "é" * 60 + "/"
            for number in range(2):
                for suffix, data in (("cls", str(number).encode()), ("json", b'{"label": 1, "a": {"b": 2}}'), ("png", png)):
                    member = tarfile.TarInfo(f"{long}{number:04}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        end = buffer.getvalue().rstrip(b"\0")
        made.append(end + bytes(-len(end) % 512 + 1024))
    return tuple(made)
