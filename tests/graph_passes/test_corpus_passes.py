"""Every graph of the corpus under a random plan: what the passes make of it is what the plan means, and other runtimes take it.

``pytest -m "slow or not slow"`` runs every case, the default those of ``QUICK``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from graph_passes import OnnxModel, Settings, SlimResult, run_passes, save_model, slim
from graph_passes.analysis.macs import geometry_of, macs_of_graph
from graph_passes.analysis.vit_structure import Structure, find_structure
from graph_passes.onnx_io.graph_convert import import_graph, with_shapes
from graph_passes.onnx_io.graph_interface import with_image_size
from graph_passes.pass_registry import CutForm
from graph_passes.run import main
from patchslim.choices import Layout
from patchslim.plan import Origin, SlimPlan
from tests.helpers.corpus import CASES, FUSED, QUICK, REFUSED, Built, Case, built, by_name, exported, plain, reference
from tests.helpers.corpus.models import DEPTH, SIZE
from tests.helpers.corpus.rewrites import REWRITES

Images = NDArray[np.float32 | np.float16]
#: Every case; those that are not of ``QUICK`` are marked slow.
EVERY = [pytest.param(case, id=case.name, marks=[] if case.name in QUICK else pytest.mark.slow) for case in CASES]


@dataclass(frozen=True)
class Subject:
    """A case under its plan: ``wanted[i]`` is what ``images[i]``, batches of 1 and (where it may) 3, are to give."""

    built: Built
    dense: OnnxModel
    plan: SlimPlan
    images: list[Images]
    wanted: list[NDArray[np.float32]]

    @property
    def packs(self) -> bool:
        """Whether queries, keys and values come from one projection."""
        return not self.built.case.family.startswith("hf_")

    @property
    def reads(self) -> list[int]:
        """Tokens that each block reads."""
        return [self.plan.tokens, *self.plan.counts[:-1]]

    @property
    def cuts(self) -> int:
        """Blocks that compute fewer tokens than they read."""
        return sum(count < read for count, read in zip(self.plan.counts, self.reads, strict=True))


@cache
def subject(case: Case) -> Subject:
    """The case with a plan that is drawn by its name."""
    found, seed = built(case), zlib.crc32(case.name.encode())
    dense = OnnxModel.from_proto(found.model)
    if found.input_shape[2] is None:
        dense = with_image_size(dense, SIZE, SIZE)
    pooling = {"token+avg": "avg"}.get(found.head, found.head)
    folded = run_passes(dense, ["fold_constants", "expand_attention"], Settings()).model
    plan = SlimPlan(
        model="corpus",
        tokens=found.tokens,
        grid=found.grid,
        prefix_tokens=found.prefix,
        pooling=pooling,
        head_tokens=found.head_tokens if pooling == "token" else [],
        mode="compact",
        kept=random_kept(found, random.Random(seed)),
        geometry=geometry_of(structure(folded)),
        origin=Origin(score="none", criterion="manual", value=0.0),
    )
    images = [found.images(seed % 1000, batch) for batch in ((1, 3) if case.dynamic else (1,))]
    return Subject(found, dense, plan, images, [reference(case, plan.kept, batch) for batch in images])


def random_kept(found: Built, rng: random.Random) -> list[list[int]]:
    """Nested, with some blocks uncut; the last may lose what the head does not read."""
    prefix, patches, kept = list(range(found.prefix)), list(range(found.prefix, found.tokens)), []
    for block in range(found.depth):
        if block == 1 or rng.random() < 0.8:
            patches = sorted(rng.sample(patches, rng.randint(2, max(2, len(patches) - 1))))
        kept.append(prefix + patches)
    if rng.random() < 0.5:
        kept[-1] = sorted({*found.head_tokens, *(patches if found.pooled else ())})
    return kept


def structure(model: OnnxModel) -> Structure:
    return find_structure(import_graph(with_shapes(model)))


@cache
def slimmed(case: Case, layout: Layout) -> SlimResult:
    return slim(subject(case).dense, subject(case).plan, layout=layout)


def assert_answers(case: Case, model: OnnxModel, expected: list[NDArray[np.float32]] | None = None) -> None:
    """ONNX Runtime gives the reference's answers, or those ``expected``, whatever the batch."""
    options, given = ort.SessionOptions(), subject(case)
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    for images, wanted in zip(given.images, expected or given.wanted, strict=True):
        result = session.run(None, {given.built.input_name: images})[0]
        np.testing.assert_allclose(result, wanted, rtol=0, atol=given.built.tolerance)


def attentions_of(model: OnnxModel) -> list[tuple[int, int]]:
    """Queries and keys of each Softmax, by ONNX's own shape inference."""
    proto = model.to_proto()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in inferred.graph.value_info}
    found = [shapes[node.input[0]] for node in inferred.graph.node if node.op_type == "Softmax"]
    return [(shape[-2], shape[-1]) for shape in found]


# The corpus is what it says


@pytest.mark.parametrize("case", EVERY)
def test_a_graph_computes_what_its_pytorch_model_does(case: Case) -> None:
    found = built(case)
    onnx.checker.check_model(found.model)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(found.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for batch in (1, 3) if case.dynamic else (1,):
        images = found.images(1, batch)
        result = session.run(None, {found.input_name: images})[0]
        np.testing.assert_allclose(result, plain(case, images), rtol=0, atol=found.tolerance)


@pytest.mark.parametrize("case", [entry for entry in EVERY if "dynamo23" in str(entry.id)])
def test_opset_23_emits_the_attention_operator(case: Case) -> None:
    assert Counter(node.op_type for node in exported(case).graph.node)["Attention"] >= DEPTH


def test_rewrites_change_the_form_and_not_the_names_of_inputs() -> None:
    source = exported(by_name("timm_class-dynamo20-unfused"))
    before = Counter(node.op_type for node in source.graph.node)
    for name in REWRITES:
        model = exported(next(case for case in CASES if case.exporter == f"rewritten:{name}"))
        after = Counter(node.op_type for node in model.graph.node)
        assert after != before or name == "scale-on-k", name  # as many nodes, in another place
        assert [value.name for value in model.graph.input] == [value.name for value in source.graph.input]


# The passes


@pytest.mark.parametrize("case", EVERY)
def test_a_cut_graph_answers_as_the_plan_means_and_computes_nothing_else(case: Case) -> None:
    given, result = subject(case), slimmed(case, "split")
    assert_answers(case, result.model)
    sites = {entry.name: entry.sites for entry in result.results}
    assert sites["cut_tokens"] == given.cuts > 0
    assert sites["split_qkv"] == (given.cuts if given.packs else 0)
    assert sites["order_tokens"] == (given.plan.order() != list(range(given.plan.tokens)))
    proto = result.model.to_proto()
    taken = [
        node.op_type for node in proto.graph.node if node.name.startswith("block_") and node.op_type in ("Slice", "Gather")
    ]
    assert taken == ["Slice"] * given.cuts * (given.built.attentions + 1)  # before the queries, and of the shortcut
    per_block = zip(given.plan.counts, given.reads, strict=True)
    pool = [(1, sum(token in given.built.pooled for token in given.plan.kept[-1]))] if given.built.head == "map" else []
    assert attentions_of(result.model) == [pair for pair in per_block for _ in range(given.built.attentions)] + pool
    assert macs_of_graph(structure(result.model)).total == given.plan.macs("split")
    onnx.checker.check_model(proto, full_check=True)
    again = slim(result.model, given.plan)
    assert not again.modified
    assert again.model.to_proto().SerializeToString() == proto.SerializeToString()


@pytest.mark.parametrize("case", EVERY)
def test_a_packed_projection_stays_packed_and_openvino_answers_alike(case: Case) -> None:
    openvino = pytest.importorskip("openvino")
    given, model = subject(case), slimmed(case, "packed").model
    assert_answers(case, model)
    assert given.plan.geometry.packed_qkv is given.packs
    assert macs_of_graph(structure(model)).total == given.plan.macs("packed")
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.Core().read_model(model.to_proto().SerializeToString()), "CPU", config)
    for images, wanted in zip(given.images, given.wanted, strict=True):
        np.testing.assert_allclose(compiled([images])[0], wanted, rtol=0, atol=given.built.tolerance)


@pytest.mark.parametrize(
    "name",
    [
        "timm_eva02-dynamo20-unfused",
        "timm_avg_class-script17",
        "hf_siglip_avg-script17-static-slim",
        pytest.param("hf_siglip-dynamo20", marks=pytest.mark.slow),
    ],
)
def test_where_the_head_pools_the_last_cut_lets_go_of_prefix_tokens(name: str) -> None:
    given = subject(by_name(name))
    patches = [token for token in given.plan.kept[-2] if token >= given.plan.prefix_tokens]
    kept = [*given.plan.kept[:-1], patches[1:]]
    plan = SlimPlan.model_validate(given.plan.model_dump() | {"kept": kept})
    model = slim(given.dense, plan).model
    wanted = [reference(by_name(name), kept, images) for images in given.images]
    assert_answers(by_name(name), model, wanted)
    ours = [node.op_type for node in model.to_proto().graph.node if node.name.startswith("block_")]
    assert "Gather" not in ours


@pytest.mark.parametrize("form", ["slice", "gather", "matmul"])
@pytest.mark.parametrize(
    "name",
    [
        "timm_registers-dynamo23-static",
        "timm_eva02-dynamo20-unfused",
        "timm_map-dynamo20-unfused",
        "hf_siglip_avg-script17-static-slim",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("timm_class-dynamo23", "torchvision-script17", "hf_siglip-dynamo20")
        ),
    ],
)
def test_every_form_of_a_cut_answers_alike(name: str, form: CutForm) -> None:
    case = by_name(name)
    model = slim(subject(case).dense, subject(case).plan, cut=form).model
    assert_answers(case, model)
    ours = [node.op_type for node in model.to_proto().graph.node if node.name.startswith(("block_", "token_order"))]
    kinds = {"slice": {"Slice"}, "gather": {"Gather"}, "matmul": set[str]()}[form]
    assert {kind for kind in ours if kind in ("Slice", "Gather")} == kinds


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.exporter == "dynamo")) for case in REFUSED],
)
def test_a_misfit_is_refused_by_name(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = tmp_path / "model.onnx", tmp_path / "plan.json"
    onnx.checker.check_model(exported(case))
    onnx.save(exported(case), model)
    subject(by_name("timm_class-script17")).plan.save(plan)
    before = model.read_bytes()
    monkeypatch.setattr(sys, "argv", ["graph_passes.run", str(model), "--plan", str(plan), "-o", str(tmp_path / "slim.onnx")])
    assert main() == 3
    printed = capsys.readouterr()
    assert f"{model}: not a Vision Transformer that the passes understand: " in printed.err
    fault = {"swin": "node '", "cnn": "no Softmax that weighs values", "text": "graph input 'images': expected images"}
    assert fault[case.family] in printed.err
    assert "refused at " in printed.out
    assert model.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "plan.json"}


# TensorRT-RTX

# A failed build changes the next one in its process, so the first failure ends it; for one target, sound builds may share it.
BUILD = """
import io, json, os, sys
from pathlib import Path
from export.engines.onnx_info import read_onnx
from export.engines.tensorrt_worker import BuildFailed, BuildRequest, build
for path in map(Path, sys.argv[1:]):
    facts, out = read_onnx(path), str(path.with_suffix(""))
    profiles = [] if facts.fixed_batch else [[1, 2, 4]]
    request = BuildRequest("tensorrt_rtx", str(path), f"{out}.engine", f"{out}.json", "sm89", "fp16", facts.input_name,
                           facts.image_shape, profiles, facts.attentions)
    try:
        print(json.dumps([path.stem, build(request, io.StringIO()).get("fused_attentions"), len(facts.attentions)]), flush=True)
    except BuildFailed as error:
        print(json.dumps([path.stem, str(error), len(facts.attentions)]), flush=True)
        break
os._exit(0)
"""


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([by_name(name) for name in FUSED], id="quick"),
        pytest.param([case for case in CASES if case.name not in FUSED], id="rest", marks=pytest.mark.slow),
    ],
)
def test_tensorrt_builds_fp16_with_every_attention_fused(cases: list[Case], tmp_path: Path) -> None:
    paths = {case: tmp_path / f"{number}.onnx" for number, case in enumerate(cases)}
    expected = {}
    for case, path in paths.items():
        given = subject(case)
        save_model(slim(given.dense, given.plan, layout="packed", precision="fp16").model, path)
        attentions = given.built.attentions * DEPTH + (given.built.head == "map")
        expected[case.name] = (attentions, attentions)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", BUILD, *map(str, paths.values())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    with (
        (tmp_path / "log.txt").open("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as worker,
    ):
        assert worker.stdout is not None
        lines = [json.loads(line) for line in worker.stdout if line.startswith("[")]
        log.seek(0)
        said = log.read()
    found = {case.name: tuple(counts) for case, (_, *counts) in zip(paths, lines, strict=False)}
    assert found == expected, said[-2000:]
