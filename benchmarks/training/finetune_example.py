"""Make the walk-through's example: a fine-tuned timm checkpoint and a folder of images, as one would have them at home.

    python -m benchmarks.training.finetune_example --data cifar10-train.tar --test-data cifar10-test.tar --output example

The cats and dogs of CIFAR-10 become JPEG files in ``example/pets/train`` and ``example/pets/val``, one folder per class. The
ViT-Ti/16 of the accuracy tables, which knows ten classes, gets a head of two and is fine-tuned on the training images;
``example/checkpoint.pth.tar`` holds its weights in the form that timm's ``train.py`` saves.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import timm
import timm.layers
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from benchmarks.training.train_cifar10 import ARCHITECTURE, CLASSES, MEAN, STD, enlarged, read_tar

WEIGHTS = Path(__file__).parents[1] / "accuracy" / "cifar10_vit_ti.safetensors"
PETS = ("cat", "dog")


def write_images(tar: Path, folder: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """Write the first ``per_class`` images of each class as JPEG; return them as uint8 (n, 3, 32, 32) and classes (n,)."""
    images, targets = read_tar(tar)
    chosen = [torch.nonzero(targets == CLASSES.index(name)).flatten()[:per_class] for name in PETS]
    for name, rows in zip(PETS, chosen, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for row in rows.tolist():
            picture = Image.fromarray(np.ascontiguousarray(images[row].permute(1, 2, 0).numpy()))
            picture.save(folder / name / f"{row:05d}.jpg", quality=95)
    return images[torch.cat(chosen)], torch.cat([torch.full_like(rows, label) for label, rows in enumerate(chosen)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10-train.tar")
    parser.add_argument("--test-data", type=Path, required=True, help="cifar10-test.tar")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument("--steps", type=int, default=60, help="of fine-tuning, 16 images each")
    args = parser.parse_args()
    images, targets = write_images(args.data, args.output / "pets" / "train", 2000)
    write_images(args.test_data, args.output / "pets" / "val", 500)

    timm.layers.set_fused_attn(False)  # several times faster backwards on a CPU
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    model = timm.create_model(ARCHITECTURE, num_classes=len(PETS))
    state = load_file(WEIGHTS)
    rows = [CLASSES.index(name) for name in PETS]
    state["head.weight"], state["head.bias"] = state["head.weight"][rows], state["head.bias"][rows]
    model.load_state_dict(state)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.05)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-5 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        drawn = torch.randint(len(images), (16,), generator=rng)
        pixels = enlarged((images[drawn].float() / 255 - mean) / std, 224)
        pixels = pixels.flip(-1) if torch.rand((), generator=rng) < 0.5 else pixels
        loss = functional.cross_entropy(model(pixels), targets[drawn], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    torch.save({"arch": ARCHITECTURE, "epoch": 0, "state_dict": model.state_dict()}, args.output / "checkpoint.pth.tar")


if __name__ == "__main__":
    main()
