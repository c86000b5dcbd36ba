"""A corpus of foreign Vision Transformer graphs: what libraries and exporters make of tiny random models.

``CASES`` are graphs that a token plan can be applied to, or that are refused by a named feature (relative position bias);
``REFUSED`` are graphs that are no plain Vision Transformer. ``built(case)`` makes the ONNX model, ``reference`` says what a
plan means.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from tests.helpers import exporters
from tests.helpers.corpus import models
from tests.helpers.corpus.models import DEPTH, FAMILIES, GRID, SIZE, WIDTH, Family, Head
from tests.helpers.corpus.reference import masked_logits
from tests.helpers.corpus.rewrites import REWRITES
from tests.helpers.made_once import model_made_once


@dataclass(frozen=True)
class Case:
    """One graph: a family, how it is exported and what is done to it afterwards; ``name`` is its test id."""

    name: str
    family: str
    exporter: str
    opset: int
    fused: bool = True
    dynamic: bool = True
    half: bool = False
    simplified: bool = False
    folded: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Built:
    """A graph and what a plan has to know about it; read ``model``, do not change it: it is shared by all tests."""

    model: onnx.ModelProto
    case: Case
    tokens: int
    grid: tuple[int, int]
    prefix: int
    depth: int
    width: int
    head: Head
    head_tokens: list[int]
    pooled: list[int]
    attentions: int
    features: frozenset[str]
    input_name: str
    input_shape: tuple[int | None, ...]
    tolerance: float

    def images(self, seed: int, batch: int = 1) -> NDArray[np.float32 | np.float16]:
        """Random images of the graph's own dtype, (batch, 3, h, w); a static graph takes batch 1 alone."""
        return _images(seed, batch).astype(np.float16 if self.case.half else np.float32)


def _images(seed: int, batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)


def _case(family: str, exporter: str, opset: int, *how: str) -> Case:
    """A case whose name says all that differs from a folded float32 export of fused attention with a dynamic batch."""
    short = {"torchscript": "script", "dynamo": "dynamo"}.get(exporter, exporter)
    return Case(
        name="-".join([family, f"{short}{opset}", *how]),
        family=family,
        exporter=exporter,
        opset=opset,
        fused="unfused" not in how,
        dynamic="static" not in how,
        half="fp16" in how,
        simplified="slim" in how,
        folded="unfolded" not in how,
    )


# Every family meets dynamo at opset 20 and TorchScript at opset 17, as far as they can; the rest is spread over them.
_DYNAMO_20: dict[str, tuple[str, ...]] = {
    "timm_class": ("unfused",),
    "timm_distilled": ("unfused", "static"),
    "timm_registers": ("unfused", "slim"),
    "timm_avg": (),
    "timm_avg_class": ("unfused", "fp16"),
    "timm_map": ("unfused",),
    "timm_layer_scale": ("static",),
    "timm_swiglu": ("unfused",),
    "timm_parallel_things": ("unfused",),
    "timm_parallel_scaling": ("unfused",),
    "timm_eva02": ("unfused",),
    "timm_dinov3": (),
    "timm_beit": ("unfused",),
    "hf_vit": (),
    "hf_deit": ("unfused",),
    "hf_deit_teacher": ("static",),
    "hf_dinov2": (),
    "hf_dinov2_registers": ("unfused",),
    "hf_clip": ("unfused", "slim"),
    "hf_siglip": (),
    "hf_siglip_avg": ("fp16",),
    "hf_beit": ("unfused",),
    "hf_dinov3": (),
    "torchvision": (),
}
_SCRIPT_17: dict[str, tuple[str, ...]] = {
    "timm_class": (),
    "timm_distilled": ("slim",),
    "timm_registers": ("unfused",),
    "timm_avg": ("unfused", "static"),
    "timm_avg_class": (),
    "timm_map": ("slim",),
    "timm_layer_scale": ("unfused", "fp16"),
    "timm_swiglu": ("static", "slim"),
    "timm_parallel_things": (),
    "timm_parallel_scaling": (),
    "timm_eva02": ("unfused", "slim"),  # fused, the tracer makes a tensor of is_causal, which PyTorch refuses
    "timm_dinov3": ("unfused",),
    "timm_beit": (),
    "hf_vit": ("unfused", "unfolded"),
    "hf_deit": ("static",),
    "hf_deit_teacher": ("slim",),
    "hf_dinov2": ("unfused",),
    # no hf_dinov2_registers: its antialiased resize of positions has no TorchScript symbol
    "hf_clip": ("fp16",),
    "hf_siglip": ("unfused",),
    "hf_siglip_avg": ("static", "slim"),
    "hf_beit": (),
    "hf_dinov3": ("unfused",),
    "torchvision": (),
}

# TorchScript writes fused attention from opset 14 on.
_OLD_OPSETS = [
    ("timm_class", 11), ("hf_vit", 11), ("timm_registers", 12), ("timm_map", 12), ("hf_clip", 12), ("timm_eva02", 12),
    ("hf_deit", 13), ("timm_avg", 13), ("hf_vit", 14), ("timm_swiglu", 14), ("torchvision", 14),
]  # fmt: skip

CASES: list[Case] = [
    *(_case(family, "dynamo", 20, *how) for family, how in _DYNAMO_20.items()),
    *(_case(family, "torchscript", 17, *how) for family, how in _SCRIPT_17.items()),
    _case("timm_class", "dynamo", 18),
    _case("timm_class", "dynamo", 20, "slim"),
    _case("timm_class", "dynamo", 23),
    _case("timm_class", "dynamo", 20, "static", "fp16"),
    _case("timm_registers", "dynamo", 23, "static"),
    _case("timm_map", "dynamo", 23),
    _case("timm_dinov3", "dynamo", 23, "slim"),
    _case("hf_vit", "dynamo", 23),
    _case("hf_clip", "dynamo", 18, "unfused"),
    _case("hf_siglip", "dynamo", 23, "fp16"),
    _case("hf_dinov2_registers", "dynamo", 18, "slim"),
    _case("torchvision", "dynamo", 18, "static"),
    _case("torchvision", "dynamo", 23),
    _case("torchvision", "torchscript", 17, "slim"),
    _case("timm_class", "torchscript", 17, "unfused", "unfolded"),
    *(_case(family, "torchscript", opset, "unfused") for family, opset in _OLD_OPSETS),
    _case("timm_class", "torchscript", 14),
    _case("hf_vit", "optimum", 18),
    _case("hf_dinov2", "optimum", 18, "unfused"),
    _case("hf_deit_teacher", "optimum", 18),
    *(Case(f"timm_class-rewritten:{name}", "timm_class", f"rewritten:{name}", 20, fused=False) for name in REWRITES),
]

#: A case of every kind that the passes have to see through: other exporters, opsets, projections, masks, rotations, biases and
#: pools. Tests of all ``CASES`` mark the others slow.
QUICK: list[str] = [
    "timm_map-dynamo20-unfused", "timm_parallel_scaling-script17", "timm_eva02-dynamo20-unfused", "timm_beit-script17",
    "timm_registers-dynamo23-static", "timm_layer_scale-script17-unfused-fp16", "hf_vit-dynamo20", "hf_dinov3-script17-unfused",
    "hf_siglip_avg-script17-static-slim", "hf_deit_teacher-optimum18", "torchvision-dynamo18-static",
    "timm_class-rewritten:gemm", "timm_class-rewritten:scale-after",
    "hf_vit-script11-unfused", "timm_class-script14",
]  # fmt: skip

#: Those of ``QUICK`` whose attentions are written in ways of their own: what TensorRT has to fuse.
FUSED: list[str] = [
    "timm_map-dynamo20-unfused", "timm_beit-script17", "timm_registers-dynamo23-static",
    "timm_layer_scale-script17-unfused-fp16", "hf_vit-dynamo20", "timm_class-rewritten:scale-after",
]  # fmt: skip

REFUSED: list[Case] = [
    _case("swin", "torchscript", 17),
    _case("cnn", "dynamo", 20),
    _case("cnn", "torchscript", 17),
    _case("text", "dynamo", 20),
    _case("text", "torchscript", 17),
]


def by_name(name: str) -> Case:
    """The case of that id; ``KeyError`` when there is none."""
    return {case.name: case for case in [*CASES, *REFUSED]}[name]


@cache
def exported(case: Case) -> onnx.ModelProto:
    """The ONNX model of any case, refused ones included; shared by all tests, so not to be changed."""
    return model_made_once(f"corpus-{case.name}", lambda: _export(case))


def _export(case: Case) -> onnx.ModelProto:
    model = models.torch_model(case.family, case.fused)
    example = torch.from_numpy(_images(0, 2 if case.dynamic else 1))
    if case.family == "text":
        example = torch.randint(0, 100, (2, 17))
    if case.half:
        model, example = copy.deepcopy(model).half(), example.half()
    if case.exporter.startswith("rewritten:"):
        source = exported(by_name(f"{case.family}-dynamo20-unfused"))
        return REWRITES[case.exporter.removeprefix("rewritten:")](source)
    if case.exporter == "dynamo":
        proto = exporters.dynamo(model, example, case.opset, case.dynamic)
    elif case.exporter == "torchscript":
        proto = exporters.torchscript(model, example, case.opset, case.dynamic, case.folded)
    else:
        proto = exporters.optimum(model, example, case.opset)
    return exporters.simplified(proto) if case.simplified else proto


@cache
def built(case: Case) -> Built:
    """The graph of a case of ``CASES`` with its tokens, head and input; read once per process."""
    family: Family = FAMILIES[case.family]
    model = exported(case)
    value = model.graph.input[0]
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim)
    return Built(
        model=model,
        case=case,
        tokens=family.tokens,
        grid=GRID,
        prefix=family.prefix,
        depth=DEPTH,
        width=WIDTH,
        head=family.head,
        head_tokens=list(family.head_tokens),
        pooled=list(family.pooled),
        attentions=family.attentions,
        features=family.features,
        input_name=value.name,
        input_shape=shape,
        tolerance=5e-2 if case.half else 1e-4,
    )


def plain(case: Case, images: NDArray[np.float32 | np.float16]) -> NDArray[np.float32]:
    """Output of the case's PyTorch model in float32 with all tokens; half-precision cases have their rounded weights."""
    with torch.no_grad():
        result: NDArray[np.float32] = _float32(case)(torch.from_numpy(images.astype(np.float32))).numpy()
    return result


def reference(case: Case, kept: Sequence[Sequence[int]], images: NDArray[np.float32 | np.float16]) -> NDArray[np.float32]:
    """Output of the case's PyTorch model in float32 under a nested plan in compact form.

    ``kept[l]`` are the sorted original indices of the tokens that block l computes from keys and values of ``kept[l - 1]`` (of
    all tokens in the first block). It may leave out prefix tokens in the last block where the head does not read them.
    """
    return masked_logits(_float32(case), FAMILIES[case.family], kept, torch.from_numpy(images.astype(np.float32)))


@cache
def _float32(case: Case) -> torch.nn.Module:
    model = models.torch_model(case.family, True)
    return copy.deepcopy(model).half().float() if case.half else model
