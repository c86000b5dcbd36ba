"""Every command of README and docs/ is run: here, small, or by another test; what cannot be run anywhere says why.

``_RUN`` has them in an order in which each finds what it needs. A command of a page that is in no table fails
a quick test.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(?:pip|uv|python|torchrun|docker|openssl|patchslim|curl|kubectl) ")

_FEW = "--calibration-images 8 --eval-images 8 --max-top1-drop 100 --no-measure-latency"
_ORT = "bundles/vit_ti-ort"


@dataclass(frozen=True)
class Small:
    """A command as its page has it, and what makes it small: words that others take the place of, and further options."""

    command: str
    more: str = ""
    instead: tuple[tuple[str, str], ...] = ()
    folder: str = "."  # where it is run
    codes: tuple[int, ...] = (0,)
    makes: str = ""  # what must be there afterwards


_RUN = (
    Small(
        "pip install uv && uv run python -m export.run --model vit_ti --engine trt",
        f"{_FEW} --target sm89 --precision fp16",
        makes="bundles/vit_ti-trt/engine/model.fp16.sm89.engine",
    ),
    Small("uv run python -m validate.run bundles/vit_ti-trt", "--latency-seconds 0"),
    Small("uv run python -m export.build bundles/vit_ti-trt/recipe.json -o engine", makes="engine/build.json"),
    Small("openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem", makes="key.pem"),
    Small("openssl pkey -in key.pem -pubout -out key.pub.pem", makes="key.pub.pem"),
    Small("uv run python -m export.run --model vit_ti --engine ort --sign key.pem", _FEW, makes=f"{_ORT}/model.sig"),
    Small(f"uv run python -m validate.run {_ORT} --public-key key.pub.pem", "--latency-seconds 0"),
    Small(
        "python -m graph_passes.run model.onnx --passes image_input,softmax_output --image float-nchw-255 "
        "--mean 0.485 0.456 0.406 --std 0.229 0.224 0.225 -o model.pixels.onnx",
        instead=(("-o model.pixels.onnx", "-o ../../model.pixels.onnx"),),
        folder=_ORT,
        makes="model.pixels.onnx",
    ),
    Small(
        "python serving/triton/make_repository.py ../repository --backend onnxruntime",
        folder=_ORT,
        makes="bundles/repository/vit_ti-ort/config.pbtxt",
    ),
    Small(
        "uv run python -m slimming.run --model vit_ti --macs-reduction 0.45 --sweep 0.3,0.45,0.6 --output plan.json",
        "--calibration-images 8 --eval-images 8",
        instead=(("0.3,0.45,0.6", "0.3,0.45"),),
        makes="plan.html",
    ),
    Small("uv run python -m export.run --model vit_ti --plan plan.json", _FEW, makes=f"{_ORT}/manifest.json"),
    Small("uv run python -m graph_passes.run dense.onnx --plan plan.json --output slim.onnx", makes="slim.onnx"),
    Small(f"uv run python -m benchmarks.latency --dense dense.onnx --bundle {_ORT}", "--rounds 1 --warmup 0 --batch 1"),
    Small(
        "uv run python -m graph_passes.run model.onnx --passes fold_constants,my_pass --save-intermediates steps "
        "--output out.onnx",
        instead=(("my_pass", "cut_last_block"), ("model.onnx", "dense.onnx")),  # the pass that the page quotes
        makes="steps",
    ),
    Small("uv run python -m graph_passes.run --explain my_pass", instead=(("my_pass", "cut_last_block"),)),
    Small("uv run python -m benchmarks.speed.search_cost --images 256", instead=(("256", "4"),)),
    Small(
        "uv run python -m export.run --model vit_ti --weights checkpoint.pth.tar --data pets --eval-images all "
        "--mean 0.4914 0.4822 0.4465 --std 0.247 0.2435 0.2616 --crop-pct 1",
        "--max-top1-drop 100 --no-measure-latency",
        makes=f"{_ORT}/manifest.json",
    ),
    Small(f"uv run python -m validate.run {_ORT} --images pets/val", "--latency-seconds 0"),
    Small(
        "uv run python -m export.run --model vit_ti --weights checkpoint.pth.tar --data pets",
        "--max-top1-drop 100 --no-measure-latency",
        makes=f"{_ORT}/manifest.json",
    ),
    Small(
        "uv run python -m export.run --model vit_ti --weights checkpoint.pth.tar --data pets --eval-images all "
        "--max-top1-drop 1 --gate confidence --json > export.json",
        instead=((" --json", " --no-measure-latency --json"),),
        codes=(5,),  # a few images cannot prove that no more than a point is lost
        makes="export.json",
    ),
    Small(
        f"uv run python -m validate.run {_ORT} --provider CPUExecutionProvider --json > check.json",
        instead=((" --json", " --latency-seconds 0 --json"),),
        makes="check.json",
    ),
    Small(
        f"uv run python -m validate.run {_ORT} --data pets/val --json > attestation.json",
        instead=((" --json", " --latency-seconds 0 --json"),),
        makes="attestation.json",
    ),
    Small(f"uv run python -m validate.run {_ORT} --attestation attestation.json"),
    Small(f"uv run python -m validate.diff {_ORT} bundles/vit_ti-trt", codes=(5,)),  # they differ
    Small(
        "uv run python -m benchmarks.accuracy.tables --show benchmarks/accuracy/results/digits.json "
        "benchmarks/accuracy/results/cifar10-vit_ti.json",
        folder=str(ROOT),
    ),
    Small("uv run python -m benchmarks.speed.matrix --show benchmarks/speed/matrix.json", folder=str(ROOT)),
    Small(
        "uv run python -m benchmarks.training.train_digits --output vit_ti_digits.safetensors",
        "--stages 6:1:2 --images 4 --eval-images 2",
        makes="vit_ti_digits.safetensors",
    ),
)

_SERVER = "tests/export/serving/test_triton_server.py"
#: Commands that another test runs, and which.
_ELSEWHERE = {
    "uv run python -m slimming.run --onnx dense.onnx --mean 0.5 --std 0.5 --data pets --eval-images 1000 -o plan.json": (
        "tests/project/test_docs.py::test_a_model_that_is_not_timms_goes_the_way_that_is_written"
    ),
    "python serving/check_server.py localhost:8000": f"{_SERVER}::test_what_is_not_the_models_answer_is_exit_code_5",
    "python docker/load.py BUNDLE localhost:8001 --clients 8 --requests 200": (
        f"{_SERVER}::test_many_clients_lose_no_request_and_get_no_wrong_answer"
    ),
    "uv run python -m benchmarks.accuracy.tables --name digits --eval-images 1000 --seeds 0 "
    "--output benchmarks/accuracy/results/digits.json": (
        "tests/benchmarks/test_accuracy_tables.py::test_every_method_has_its_rows_within_the_budget"
    ),
    "uv run python -m benchmarks.accuracy.alternatives --name cifar10-alternatives --model vit_tiny_patch16_224 "
    "--model-arg img_size=32 patch_size=4 embed_dim=128 depth=8 num_heads=4 "
    "--weights benchmarks/accuracy/cifar10_vit.safetensors --data cifar10-test.tar "
    "--calibration-data cifar10-train.tar --calibration-images 1024 --budgets 0.45 0.6 "
    "--output benchmarks/results/cifar10-alternatives.json": (
        "tests/benchmarks/test_alternatives.py::test_every_row_is_measured_once_and_costs_what_it_says"
    ),
    "uv run python -m benchmarks.accuracy.alternatives --name cifar10-distilled --model vit_tiny_patch16_224 "
    "--model-arg img_size=32 patch_size=4 embed_dim=128 depth=8 num_heads=4 "
    "--weights benchmarks/accuracy/cifar10_vit.safetensors --data cifar10-test.tar "
    "--calibration-data cifar10-train.tar --eval-images 5000 --calibration-images 4096 --budgets 0.45 "
    "--distill-steps 3200 --distill-lr 0.0005 --distill-precision bf16 --rows blocks-auto distilled "
    "--output benchmarks/results/cifar10-distilled.json": (
        "tests/benchmarks/test_alternatives.py::test_some_rows_alone_are_those_of_a_whole_run"
    ),
    "uv run python -m benchmarks.speed.matrix --data cifar10-test.tar --calibration-data cifar10-train.tar "
    "--output matrix.json": ("tests/benchmarks/test_speed_matrix.py::test_the_whole_matrix_at_tiny_size"),
    "uv run python -m benchmarks.gpu.headline --data cifar10-test.tar --train-data cifar10-train.tar --minutes 8 "
    "--output headline.json": "tests/benchmarks/test_gpu_headline.py::test_every_row_is_measured_and_a_second_call_goes_on",
    "uv run python -m benchmarks.gpu.sizes --minutes 4 --output sizes.json": (
        "tests/benchmarks/test_gpu_headline.py::test_every_variant_is_timed_beside_the_dense_model"
    ),
    "uv run python -m benchmarks.gpu.engines --data cifar10-test.tar --train-data cifar10-train.tar --output engines.json": (
        "tests/benchmarks/test_gpu_engines.py::test_slim_and_dense_are_timed_side_by_side_and_what_is_not_says_why"
    ),
}
_NO_IMAGENET = "ImageNet and timm's weights, which the network has, and a GPU"
_NO_CONTAINERS = "no container engine runs where this is tested: tests/docker lints the files and follows their RUN lines"
#: Commands that no test can run, and why.
_EXCEPTED = {
    "pip install uv && uv run pytest": "it is this suite",
    "docker build -f docker/edge.Dockerfile -t patchslim-edge .": _NO_CONTAINERS,
    "docker compose -f docker/compose.yaml up --build --exit-code-from load": _NO_CONTAINERS,
}
_EXCEPTED_PAGES = {"imagenet.md": _NO_IMAGENET}
#: Python of the pages that is not run here, by its first words, and why.
_PYTHON_FIRST_WORDS = {
    "from export import ExportOptions": "the whole export at its defaults: tests/export runs the same call with small options",
    "import torch\nfrom transformers import": "run by test_docs.py, with the commands of its section",
    "from timm.data import create_transform": "a search at its defaults: tests/slimming/test_top_down.py runs the same call",
    '"""Cut the last block': "a pass that is there: tests/project/test_passes_page.py compares it with the file",
}


def commands() -> dict[str, str]:
    """The commands of every page, each on one line, and the page that has it first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for kind, text in _FENCE.findall(page.read_text(encoding="utf-8")):
            for line in text.replace("\\\n", " ").splitlines():
                command = " ".join(line.split())
                if kind == "sh" or (kind == "" and _COMMAND.match(line)):
                    found.setdefault(command, page.name)
    return found


def examples() -> list[str]:
    return [text for page in PAGES for kind, text in _FENCE.findall(page.read_text(encoding="utf-8")) if kind == "python"]


def test_every_command_is_run_or_says_why_not() -> None:
    known = {*(one.command for one in _RUN), *_ELSEWHERE, *_EXCEPTED}
    told = {command for command, page in commands().items() if page not in _EXCEPTED_PAGES}
    assert sorted(told - known) == []
    assert sorted(known - told) == []  # and no entry is left of a command that is gone
    assert len(_RUN) == len({one.command for one in _RUN})


def test_a_command_that_is_run_elsewhere_names_a_test_that_is_there() -> None:
    for place in _ELSEWHERE.values():
        file, _, name = place.partition("::")
        tests = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in [node.name for node in ast.walk(tests) if isinstance(node, ast.FunctionDef)], place


def test_what_makes_a_command_small_fits_it() -> None:
    for one in _RUN:
        assert all(old in one.command for old, _ in one.instead), one.command


def in_shell(one: Small, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as its page has it, but small; the environment is there already, so ``uv run`` is left out."""
    line = one.command.removeprefix("pip install uv && ").removeprefix("uv run ")
    for old, new in one.instead:
        line = line.replace(old, new)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "PATCHSLIM_WORK": str(folder / "work")}
    return subprocess.run(
        ["bash", "-c", f"{line} {one.more}"],
        cwd=folder / one.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def write_pets(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def write_checkpoint(path: Path) -> None:
    """A checkpoint as timm's ``train.py`` leaves it."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2)
    torch.save({"epoch": 3, "arch": "vit_tiny_patch16_224", "state_dict": model.state_dict()}, path)


@pytest.mark.slow
def test_the_commands_work_one_after_the_other(tmp_path: Path) -> None:
    write_pets(tmp_path / "pets")
    write_checkpoint(tmp_path / "checkpoint.pth.tar")
    for one in _RUN:
        if "dense.onnx" in one.command and not (tmp_path / "dense.onnx").exists():  # an export keeps it in its work folder
            (tmp_path / "dense.onnx").symlink_to(next((tmp_path / "work").glob("dense-*/dense.onnx")))
        done = in_shell(one, tmp_path)
        assert done.returncode in one.codes, f"{one.command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert not one.makes or (tmp_path / one.makes).exists(), one.command
    run_examples(tmp_path)


def run_examples(folder: Path) -> None:
    """The Python of the pages, in the folder that the commands have filled, each in a process of its own.

    ``preprocess`` and ``images`` are what the reader has.
    """
    given = (
        "from pathlib import Path\nimport numpy\nfrom validate import load_manifest\n"
        "from validate.images import preprocess as replay\n"
        "rule = load_manifest(Path('bundles/vit_ti-trt')).preprocessing\n"
        "def preprocess(picture): return replay(picture, rule)\n"
        "images = numpy.zeros((1, 3, 224, 224), numpy.float32)\n"
    )
    (folder / "model.onnx").symlink_to(folder / "bundles/vit_ti-ort/model.onnx")
    ran = 0
    for code in examples():
        if code.startswith(tuple(_PYTHON_FIRST_WORDS)):
            continue
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", given + code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        ran += 1
    assert ran >= 4


def test_python_that_is_not_run_here_is_on_a_page() -> None:
    assert all(any(code.startswith(words) for code in examples()) for words in _PYTHON_FIRST_WORDS)
