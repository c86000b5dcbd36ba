"""Triton's configurations are what Triton's own protobuf reads, and the repository holds what they name."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from tests.helpers.bundles import CLASSES, SIZE
from tests.helpers.serving import bundle_with_serving, rendered, script
from validate import check_bundle
from validate.bundle import load_manifest
from validate.parity_records import EngineRecord

model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
BACKENDS = ["onnxruntime", "openvino", "python", "tensorrt"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_serving(tmp_path_factory.mktemp("serving") / "tiny", target={"batch": [1, 8, 16]})


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config.ModelConfig())


def engines(*names: str, backend: str = "tensorrt") -> EngineRecord:
    files = [f"engine/{name}" for name in names]
    return EngineRecord(backend=backend, version="11", targets=["gpu"], precision="fp16", files=files, status="not executed")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_configuration_says_what_the_manifest_says(backend: str, bundle: Path) -> None:
    config = parsed((bundle / f"serving/triton/{backend}/config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", backend, 16)
    (images,), (logits,) = config.input, config.output
    assert (images.name, list(images.dims), images.data_type) == ("image", [3, SIZE, SIZE], model_config.TYPE_FP32)
    assert (logits.name, list(logits.dims), logits.label_filename) == ("logits", [CLASSES], "labels.txt")
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    assert [warm.batch_size for warm in config.model_warmup] == [1, 16]
    assert all(list(warm.inputs["image"].dims) == [3, SIZE, SIZE] for warm in config.model_warmup)
    (group,) = config.instance_group
    kinds = {"onnxruntime": "KIND_AUTO", "tensorrt": "KIND_GPU"}
    assert group.kind == getattr(group, kinds.get(backend, "KIND_CPU"))
    assert not config.cc_model_filenames


def test_each_engine_is_named_by_its_compute_capability(bundle: Path) -> None:
    names = ("model.fp16.sm89.engine", "model.fp16.sm120.engine")
    text = rendered(bundle, engine=engines(*names))["triton/tensorrt/config.pbtxt"]
    assert dict(parsed(text).cc_model_filenames) == {"8.9": names[0], "12.0": names[1]}
    text = rendered(bundle, engine=engines(*names, backend="tensorrt_rtx"))["triton/tensorrt/config.pbtxt"]
    assert dict(parsed(text).cc_model_filenames) == {}  # Triton cannot load these
    without_weights = engines(*names).model_copy(update={"weights_from": "model.onnx"})
    files = rendered(bundle, engine=without_weights)
    assert not parsed(files["triton/tensorrt/config.pbtxt"]).cc_model_filenames
    assert "`tensorrt`: not for this bundle" in files["README.md"]  # what its recipe builds is of no use either
    assert "export.build" not in files["README.md"]
    plain = rendered(bundle, engine=engines(*names))["README.md"]
    assert "\n- `tensorrt`: the engines in `engine/`" in plain
    assert "not for this bundle" not in plain


@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_a_repository_holds_what_its_configuration_names(backend: str, bundle: Path, tmp_path: Path) -> None:
    done = script(bundle / "serving/triton/make_repository.py", tmp_path / "new" / "repository", "--backend", backend)
    assert done.returncode == 0, done.stderr
    model = tmp_path / "new" / "repository" / "tiny"
    config = parsed((model / "config.pbtxt").read_text())
    assert config.name == model.name
    assert (model / config.output[0].label_filename).read_text().splitlines() == load_manifest(bundle).labels
    assert (model / "1" / (config.default_model_filename or "model.onnx")).read_bytes() == (bundle / "model.onnx").read_bytes()
    files = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
    more = ["1/model.py"] if backend == "python" else []
    assert files == ["1/model.onnx", *more, "config.pbtxt", "labels.txt"]
    assert check_bundle(bundle).exit_code == 0  # nothing was left in it
    again = script(bundle / "serving/triton/make_repository.py", tmp_path / "new" / "repository", "--backend", backend)
    assert again.returncode == 1
    assert "is there already" in again.stderr


def test_an_ir_is_what_openvino_serves(bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (mine / "engine").mkdir()
    for suffix in (".xml", ".bin"):
        (mine / "engine" / f"model{suffix}").write_bytes(suffix.encode())
    record = engines("model.xml", "model.bin", backend="openvino").model_copy(update={"precision": "bf16"})
    for name, text in rendered(mine, engine=record).items():
        (mine / "serving" / name).write_text(text)
    done = script(mine / "serving/triton/make_repository.py", tmp_path / "repository", "--backend", "openvino")
    assert done.returncode == 0, done.stderr
    model = tmp_path / "repository" / "tiny"
    assert parsed((model / "config.pbtxt").read_text()).default_model_filename == "model.xml"
    assert {path.name: path.read_bytes() for path in (model / "1").iterdir()} == {"model.xml": b".xml", "model.bin": b".bin"}


def test_engines_built_elsewhere_are_added(bundle: Path, tmp_path: Path) -> None:
    maker, built = bundle / "serving/triton/make_repository.py", []
    for target in ("sm87", "sm103"):
        built.append(tmp_path / f"model.{target}.engine")
        built[-1].write_text(target)
    done = script(maker, tmp_path / "repository", "--backend", "tensorrt", "--engine", *built)
    assert done.returncode == 0, done.stderr
    model = tmp_path / "repository" / "tiny"
    named = dict(parsed((model / "config.pbtxt").read_text()).cc_model_filenames)
    assert named == {"8.7": "model.sm87.engine", "10.3": "model.sm103.engine"}
    assert {path.name: path.read_text() for path in (model / "1").iterdir()} == {
        "model.sm87.engine": "sm87",
        "model.sm103.engine": "sm103",
    }


def test_the_bundles_own_engines_are_laid_out(bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(bundle, own)
    (own / "engine").mkdir()
    (own / "engine" / "model.sm90.engine").write_text("an engine")
    text = rendered(bundle, engine=engines("model.sm90.engine"))
    for name in ("triton/make_repository.py", "triton/tensorrt/config.pbtxt"):
        (own / "serving" / name).write_text(text[name])
    done = script(own / "serving/triton/make_repository.py", tmp_path / "repository", "--backend", "tensorrt")
    assert done.returncode == 0, done.stderr
    model = tmp_path / "repository" / "tiny"
    named = dict(parsed((model / "config.pbtxt").read_text()).cc_model_filenames)
    assert named == {"9.0": "model.sm90.engine"}
    assert (model / "1" / named["9.0"]).read_text() == "an engine"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--backend", "tensorrt"], "has no engine that Triton can load"),
        (["--backend", "tensorrt", "--engine", "model.engine"], "name it by its GPU"),
        (["--backend", "tensorrt", "--engine", 'a"b.sm89.engine'], "name it by its GPU"),
        (["--backend", "tensorrt", "--engine", "missing.sm89.engine"], "missing.sm89.engine"),
        (["--backend", "torch"], "invalid choice"),
    ],
)
def test_what_cannot_be_laid_out_is_said_and_nothing_is_left_as_if_it_could(
    arguments: list[str], fault: str, bundle: Path, tmp_path: Path
) -> None:
    done = script(bundle / "serving/triton/make_repository.py", tmp_path / "repository", *arguments)
    assert done.returncode != 0
    assert fault in done.stderr
    assert not (tmp_path / "repository" / "tiny").exists()


def test_a_full_disk_is_said_and_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: both end a write half-way."""
    resource = pytest.importorskip("resource")
    size = (bundle / "model.onnx").stat().st_size // 2
    maker = bundle / "serving/triton/make_repository.py"
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
    done = script(maker, tmp_path / "repository", preexec_fn=limit)
    assert done.returncode == 1
    assert "tiny: cannot be made: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "repository").iterdir()) == []


@pytest.mark.parametrize("name", ['a "quoted" name', "../up", "name\nwith lines", "größe", "...", "x" * 300])
def test_any_name_of_a_bundle_becomes_one_that_triton_takes(name: str, bundle: Path) -> None:
    files = rendered(bundle, name=name)
    found = parsed(files["triton/python/config.pbtxt"]).name
    assert found
    assert set(found) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert found[0].isalnum()
    assert len(found) <= 128
    for path, text in files.items():
        if path.endswith(".py"):
            compile(text, path, "exec")
