"""Every command of docs/imagenet.md runs, with a tiny model and a handful of images in place of DeiT and ImageNet."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slimming.search.distillation import MIN_DISTILL_IMAGES
from tests.helpers.commands import door_here

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"<!-- command -->\n```\n(.+)\n```", PAGE)
TINY = ["img_size=32", "patch_size=8", "embed_dim=24", "depth=3", "num_heads=2"]
SMALLER = {
    "--weights": "weights.safetensors",
    "--calibration-images": "12",
    "--eval-images": "8",
    "--finetune-epochs": "0.5",
    "--distill-steps": "2",
    "--finetune-batch-size": "2",
    "--nproc-per-node": str(min(2, torch.cuda.device_count() or 2)),
    "--max-top1-drop": "100",
}
if not torch.cuda.is_available():
    SMALLER |= {"--finetune-precision": "no", "--device": "cpu"}


def smaller(command: str) -> list[str]:
    """The command's own options, with values that fit a test."""
    words = shlex.split(command)
    for position, word in enumerate(words[:-1]):
        if word in SMALLER:
            words[position + 1] = SMALLER[word]
    if "distill" in words:
        words[words.index("--calibration-images") + 1] = str(MIN_DISTILL_IMAGES)
    words = [
        word.replace("deit_s", "vit_ti").replace("deit_b", "vit_ti") if word in ("deit_s", "deit_b") else word for word in words
    ]
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else [sys.executable, *words[1:]]
    )
    return [*launcher, *(part for argument in TINY for part in ("--model-arg", argument))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm
    from PIL import Image

    folder = tmp_path_factory.mktemp("imagenet")
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / "imagenet" / split / label).mkdir(parents=True)
            for index in range(MIN_DISTILL_IMAGES // 2):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=rng, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / "imagenet" / split / label / f"{index}.png")
    torch.manual_seed(0)
    arguments = {key: int(value) for key, value in (argument.split("=") for argument in TINY)}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **arguments)
    save_file(model.state_dict(), folder / "weights.safetensors")
    return folder


def test_the_page_has_its_commands_and_says_that_none_was_executed() -> None:
    assert len(COMMANDS) == 6
    assert "**Not executed.**" in PAGE


TORCHRUN = next(number for number, command in enumerate(COMMANDS) if command.startswith("torchrun"))


@pytest.mark.parametrize(
    "number",  # what torchrun finds is exported by the command after it
    [pytest.param(number, marks=pytest.mark.slow if number >= TORCHRUN else []) for number in range(len(COMMANDS))],
)
def test_a_command_of_the_page_runs_small(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = smaller(COMMANDS[number])
    monkeypatch.chdir(folder)
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATCHSLIM_WORK": str(folder / "work"),
    }.items():
        monkeypatch.setenv(name, value)
    if "torch.distributed.run" in words:
        found = subprocess.run(words, capture_output=True, text=True, timeout=300)
    else:
        found = door_here(words)
    assert found.returncode == 0, found.stderr[-3000:]
    output = folder / words[words.index("-o") + 1]
    if output.suffix == ".json":
        plan = json.loads(output.read_text())
        assert output.with_suffix(".html").is_file()
        assert plan["weights"]["fit"] == (words[words.index("--fit") + 1] if "--fit" in words else "closed-form")
        trained = "--finetune-epochs" in words or "distill" in words
        assert (plan["weights"]["finetune"] is not None) == trained
        assert output.with_name(plan["weights"]["file"]).is_file()
        walk = plan["origin"]["walk"]
        assert (walk is not None) == ("max" in words)
        if walk is not None:
            assert walk["dense_top1"] is not None
            assert "The way to the largest reduction" in output.with_suffix(".html").read_text(encoding="utf-8")
        assert not output.with_suffix(".checkpoint").exists()
    else:
        manifest = json.loads((output / "manifest.json").read_text())
        assert [rung["stage"] for rung in manifest["rungs"]][:2] == ["pytorch", "pytorch-slim"]
