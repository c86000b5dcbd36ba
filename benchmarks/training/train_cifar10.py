"""Train the natural-image models of the accuracy tables on CIFAR-10: ViT-Ti/16 at 224 px on a GPU, or a small ViT on a CPU.

    python -m benchmarks.training.train_cifar10 --model vit_ti --data cifar10-train.tar --output cifar10_vit_ti.safetensors
    python -m benchmarks.training.train_cifar10 --data cifar10-train.tar --output cifar10_vit.safetensors

Both are timm's ``vit_tiny_patch16_224``, trained from scratch. ``vit_ti`` is that model as it is: 196 patches of images
enlarged to 224 px, every step on all of them. ``small`` has 64 patches of 4 x 4 pixels at 32 px, which two CPU cores can train;
half of its steps are on random subsets of the patches (timm's PatchDropout, as in FLIP). The test file is never opened here.
Checkpoints every few hundred steps; a second call resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional

from benchmarks.training.train_digits import mimetic

ARCHITECTURE = "vit_tiny_patch16_224"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, by the arguments that it takes of timm, and what its training has of its own."""

    size: int  # pixels a side
    arguments: dict[str, Any]
    batch_size: int
    lr: float
    epochs: float
    subset: int | None = None  # patches that three steps in four see, before the last 30 % of the training

    def data_config(self) -> dict[str, Any]:
        """timm's description of the preprocessing."""
        shape = [3, self.size, self.size]
        return {"input_size": shape, "mean": list(MEAN), "std": list(STD), "crop_pct": 1.0, "interpolation": "bicubic"}


TRAININGS = {
    "small": Training(
        size=32,
        arguments={"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 8, "num_heads": 4},
        batch_size=128,
        lr=1.5e-3,
        epochs=40,
        subset=36,
    ),
    "vit_ti": Training(size=224, arguments={}, batch_size=256, lr=1e-3, epochs=100),
}


def read_tar(path: Path) -> tuple[Tensor, Tensor]:
    """Every image of a tar of class folders: uint8 (n, 3, 32, 32) and classes (n,)."""
    images, targets = [], []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name.endswith(".jpg"):
                file = archive.extractfile(member)
                assert file is not None
                images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                targets.append(CLASSES.index(Path(member.name).parent.name))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets)


def moved(drawn: Tensor, device: Any) -> Tensor:
    """A small tensor of random numbers, all of which are drawn on the CPU, on ``device``; the GPU is not waited for."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Random crop of the reflected border (4 px), mirror, brightness, contrast and colour: float (b, 3, 32, 32), normalised."""
    count, device = len(images), images.device
    padded = functional.pad(images.float() / 255, (4, 4, 4, 4), mode="reflect")
    corner = moved(torch.randint(0, 9, (2, count), generator=rng), device)
    span = torch.arange(32, device=device)
    rows = (corner[0][:, None] + span)[:, None, :, None]
    columns = (corner[1][:, None] + span)[:, None, None, :]
    mirrored = moved(torch.rand(count, generator=rng), device) < 0.5
    columns = torch.where(mirrored[:, None, None, None], columns.flip(-1), columns)
    image, channel = torch.arange(count, device=device), torch.arange(3, device=device)
    cut = padded[image[:, None, None, None], channel[None, :, None, None], rows, columns]
    gain = 1 + 0.3 * (2 * moved(torch.rand(count, 3, 1, 1, generator=rng), device) - 1)
    shift = 0.1 * (2 * moved(torch.rand(count, 3, 1, 1, generator=rng), device) - 1)
    grey = cut.mean(1, keepdim=True)
    saturation = 1 + 0.4 * (2 * moved(torch.rand(count, 1, 1, 1, generator=rng), device) - 1)
    coloured = (grey + (cut - grey) * saturation) * gain + shift
    mean, std = (moved(torch.tensor(values), device)[None, :, None, None] for values in (MEAN, STD))
    return (coloured - mean) / std


def mix(images: Tensor, targets: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """CutMix of half of the batches: images and soft targets (b, classes), label-smoothed."""
    soft = functional.one_hot(targets, len(CLASSES)).float() * 0.95 + 0.005
    if torch.rand((), generator=rng) < 0.5:
        return images, soft
    order = moved(torch.randperm(len(images), generator=rng), images.device)
    area = torch.rand((), generator=rng).item()
    side = round(32 * math.sqrt(area))
    top, left = (int(torch.randint(0, 33 - side, (), generator=rng)) for _ in range(2))
    images = images.clone()
    images[:, :, top : top + side, left : left + side] = images[order, :, top : top + side, left : left + side]
    share = side * side / 1024
    return images, soft * (1 - share) + soft[order] * share


def enlarged(images: Tensor, size: int) -> Tensor:
    """Images of ``size`` pixels a side, interpolated as Pillow does it in evaluation."""
    return images if images.shape[-1] == size else functional.interpolate(images, (size, size), mode="bicubic", antialias=True)


def features_of(model: Any, images: Tensor, keep: int, rng: torch.Generator) -> Tensor:
    """Normalised last tokens of the model on a random subset of ``keep`` patches per image."""
    tokens = model._pos_embed(model.patch_embed(images))
    if keep < tokens.shape[1] - 1:
        chosen = moved(torch.rand(len(tokens), tokens.shape[1] - 1, generator=rng), tokens.device).argsort(1)[:, :keep] + 1
        patches = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
    last: Tensor = model.norm(model.blocks(tokens))
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="cifar10-train.tar")
    parser.add_argument("--output", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--model", choices=tuple(TRAININGS), default="small")
    for name, kind in (("epochs", float), ("batch_size", int), ("lr", float)):
        defaults = ", ".join(f"{getattr(each, name):g} ({model})" for model, each in TRAININGS.items())
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"by default {defaults}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the schedule after this long at the latest")
    args = parser.parse_args()
    found = TRAININGS[args.model]
    given = {name: value for name in ("epochs", "batch_size", "lr") if (value := getattr(args, name)) is not None}
    training = dataclasses.replace(found, **given)

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, targets = (read.to(device) for read in read_tar(args.data))
    drop_path = 0.05 if training.subset else 0.0  # equal blocks are compiled once
    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), drop_path_rate=drop_path, **training.arguments).to(device)
    for block in model.blocks:
        if device.type == "cpu":
            block.attn.fused_attn = False  # several times faster than CPU SDPA's backward at these sizes
        else:
            block.compile()
    with torch.no_grad():
        side = model.patch_embed.grid_size[0]
        model.pos_embed[0, 1:] = build_sincos2d_pos_embed([side, side], dim=model.embed_dim).to(model.pos_embed)
        mimetic(model)
    helper = torch.nn.Linear(model.embed_dim, len(CLASSES)).to(device)  # reads the patches' mean; thrown away afterwards
    optimizer = create_optimizer_v2(torch.nn.ModuleList([model, helper]), opt="adamw", lr=training.lr, weight_decay=0.05)
    average = ModelEmaV3(model, decay=0.999, use_warmup=True)
    checkpoint = args.output.with_suffix(".checkpoint.pt")
    step, spent, running = 0, 0.0, torch.tensor(math.log(len(CLASSES)), device=device)
    steps = math.ceil(training.epochs * len(images) / training.batch_size)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        for part, name in ((model, "model"), (helper, "helper"), (average.module, "average"), (optimizer, "optimizer")):
            part.load_state_dict(state[name])
        rng.set_state(state["rng"])
        step, spent = state["step"], state["spent"]
        print(f"resumed at step {step}", flush=True)
    first, started = step, time.time()
    model.train()
    while True:
        elapsed = spent + time.time() - started
        progress = max(step / steps, elapsed / (60 * args.minutes))
        if progress >= 1:
            break
        factor = min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * max(factor, 1e-3)
        rows = moved(torch.randint(len(images), (training.batch_size,), generator=rng), device)
        pixels, soft = mix(augment(images[rows], rng), targets[rows], rng)
        keep = model.patch_embed.num_patches
        if training.subset and progress <= 0.7 and torch.rand((), generator=rng) >= 0.25:
            keep = training.subset
        with torch.autocast(device.type, torch.bfloat16):
            features = features_of(model, enlarged(pixels, training.size), keep, rng)
            logits, helped = model.head(features[:, 0]).float(), helper(features[:, 1:].mean(1)).float()
        loss = functional.cross_entropy(logits, soft)
        (loss + 0.5 * functional.cross_entropy(helped, soft)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        average.update(model, step=step)
        running.lerp_(loss.detach(), 0.02)
        if step % 100 == 0:
            rate = (step - first) * training.batch_size / (time.time() - started)
            print(f"step {step} {progress:.1%} loss {float(running):.4f} {rate:.0f} images/s", flush=True)
        if step % 300 == 0:
            part = checkpoint.with_suffix(".part")
            state = {"model": model, "helper": helper, "average": average.module, "optimizer": optimizer}
            saved = {name: part_.state_dict() for name, part_ in state.items()}
            torch.save(saved | {"rng": rng.get_state(), "step": step, "spent": elapsed}, part)
            part.replace(checkpoint)
    record = {
        "architecture": ARCHITECTURE,
        "arguments": training.arguments,
        "data": "CIFAR-10 train, 50,000 images",
        "seed": args.seed,
        "steps": step,
        "batch_size": training.batch_size,
        "lr": training.lr,
        "seconds": round(spent + time.time() - started),
        "data_config": training.data_config(),
        "labels": list(CLASSES),
    }
    weights = {name: value.half().cpu() for name, value in average.module.state_dict().items()}
    save_file(weights, args.output, metadata={"patchslim": json.dumps(record)})
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {args.output} after {step} steps")


if __name__ == "__main__":
    main()
