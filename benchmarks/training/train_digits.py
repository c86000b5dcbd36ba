"""Train the bundled ``vit_ti`` weights: timm's ``vit_tiny_patch16_224`` on ``digits``, from scratch, on two CPU cores or a GPU.

    python -m benchmarks.training.train_digits --output vit_ti_digits.safetensors

Small first, then grown: most steps see only a window of patches around the digit, at their true place in the 14 x 14 grid,
so that positions and patch statistics are those of the whole image and only the number of tokens differs. The last stage
sees whole images. No image of the test split is used until the end, when top-1 is measured once.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2

from slimming.data.digits import CLASSES, SIZE, render

ARCHITECTURE = "vit_tiny_patch16_224"
GRID = 14
PATCH = SIZE // GRID
#: What the weights expect of their input; stored with them, and it overrides timm's own data config.
DATA_CONFIG = {
    "input_size": [3, SIZE, SIZE],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}


class Pool(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Images rendered once, with the digit's centre, for many epochs of windows."""

    def __init__(self, split: str, length: int) -> None:
        self.split, self.length = split, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, tuple[int, int]]:
        image, target, centre = render(self.split, index)
        return np.array(image), target, centre


def load_pool(split: str, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render ``length`` images: uint8 (n, 224, 224, 3), classes (n,), centres in pixels (n, 2)."""
    loader = torch.utils.data.DataLoader(Pool(split, length), batch_size=256, num_workers=2)
    images = torch.empty(length, SIZE, SIZE, 3, dtype=torch.uint8)
    targets, centres = torch.empty(length, dtype=torch.long), torch.empty(length, 2, dtype=torch.long)
    for batch, (pixels, target, centre) in enumerate(loader):
        rows = slice(batch * 256, batch * 256 + len(pixels))
        images[rows], targets[rows], centres[rows] = pixels, target, torch.stack(centre, 1)
    return images, targets, centres


def windows(images: torch.Tensor, centres: torch.Tensor, side: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a ``side`` x ``side`` window of patches about each digit.

    Returns float (b, 3, side * 16, side * 16) in [-1, 1] and the windows' patch indices (b, side * side).
    """
    jitter = torch.rand(centres.shape, generator=rng) * 2 - 1
    corner = (centres / PATCH - side / 2 + jitter).round().long().clamp(0, GRID - side)
    column, row = corner[:, 0], corner[:, 1]
    steps = torch.arange(side)
    indices = (row[:, None, None] + steps[:, None]) * GRID + column[:, None, None] + steps
    pixels = torch.stack(
        [
            image[y * PATCH : (y + side) * PATCH, x * PATCH : (x + side) * PATCH]
            for image, x, y in zip(images, column.tolist(), row.tolist(), strict=True)
        ]
    )
    channels = torch.randperm(3, generator=rng)
    pixels = pixels[..., channels].permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels, indices.flatten(1)


@torch.no_grad()
def initialise(model: Any) -> None:
    """Start where small ViTs learn fast: sine-cosine positions, mimetic attention."""
    positions = build_sincos2d_pos_embed([GRID, GRID], dim=model.embed_dim)
    model.pos_embed[0, 1:] = positions.to(model.pos_embed)
    mimetic(model)


@torch.no_grad()
def mimetic(model: Any) -> None:
    """Start attention near the identity and values near its negative (Trockman & Kolter, 2023, eq. 4-7)."""
    width = model.embed_dim
    for block in model.blocks:
        heads, head_width = block.attn.num_heads, width // block.attn.num_heads
        query, key, value = block.attn.qkv.weight.view(3, width, width)
        for head in range(heads):
            rows = slice(head * head_width, (head + 1) * head_width)
            noise = torch.randn(width, width, device=query.device) / width**0.5
            left, strength, right = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(width, device=query.device))
            scale = strength[:head_width].sqrt()
            query[rows] = (left[:, :head_width] * scale).T
            key[rows] = right[:head_width] * scale[:, None]
        noise = torch.randn(width, width, device=query.device) / width**0.5
        left, strength, right = torch.linalg.svd(0.4 * noise - 0.4 * torch.eye(width, device=query.device))
        block.attn.proj.weight.copy_(left * strength.sqrt())
        value.copy_(strength.sqrt()[:, None] * right)


def features_of(model: Any, pixels: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The ViT's normalised last tokens (b, 1 + patches, 192) where only the patches ``indices`` are given."""
    tokens = model.patch_embed(pixels)
    prefix, patches = model.pos_embed[:, :1], model.pos_embed[0, 1:][indices]
    tokens = torch.cat([(model.cls_token + prefix).expand(len(tokens), -1, -1), tokens + patches], dim=1)
    last: torch.Tensor = model.norm(model.blocks(tokens))
    return last


@torch.inference_mode()
def evaluate(model: Any, length: int, device: str) -> float:
    """Top-1 in percent on the first ``length`` images of the test split."""
    images, targets, _ = load_pool("test", length)
    model.eval()
    hits = 0
    for rows in (slice(start, start + 64) for start in range(0, length, 64)):
        pixels = images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        hits += int((model(pixels.to(device)).argmax(1).cpu() == targets[rows]).sum())
    return 100 * hits / length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the float16 safetensors file to write")
    parser.add_argument(
        "--stages",
        nargs="+",
        default=["6:2400:128", "9:200:96", "14:500:64"],
        metavar="SIDE:STEPS:BATCH",
        help="window side in patches, steps and batch size of each stage (default: %(default)s)",
    )
    parser.add_argument("--images", type=int, default=32_000, help="train images to render (default: %(default)s)")
    parser.add_argument("--eval-images", type=int, default=4_000, help="test images at the end (default: %(default)s)")
    parser.add_argument("--opt", default="adamw", help="timm optimizer (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), drop_path_rate=0.0).to(device)
    for block in model.blocks:
        block.attn.fused_attn = False  # several times faster than CPU SDPA's backward at these sizes
    model.patch_embed.strict_img_size = False
    initialise(model)
    helper = torch.nn.Linear(model.embed_dim, len(CLASSES)).to(device)  # reads the patches' mean; thrown away afterwards
    optimizer = create_optimizer_v2(torch.nn.ModuleList([model, helper]), opt=args.opt, lr=args.lr, weight_decay=0.05)
    stages = [tuple(map(int, stage.split(":"))) for stage in args.stages]
    schedule = [(side, batch) for side, steps, batch in stages for _ in range(steps)]
    warmup = min(200, len(schedule) // 10)
    # The learning rate falls with the tokens seen, not with steps: the last stage has few steps and much to learn.
    tokens = np.cumsum([side**2 * batch for side, batch in schedule])
    checkpoint = args.output.with_suffix(".checkpoint.pt")
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        helper.load_state_dict(state["helper"])
        optimizer.load_state_dict(state["optimizer"])
        rng.set_state(state["rng"])
        first = state["step"]
        print(f"resumed at step {first}", flush=True)

    images, targets, centres = load_pool("train", args.images)
    started, running = time.time(), math.log(len(CLASSES))
    model.train()
    for step in range(first, len(schedule)):
        side, batch = schedule[step]
        progress = tokens[step] / tokens[-1]
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * factor * group.get("lr_scale", 1.0)
        rows = torch.randint(len(images), (batch,), generator=rng)
        pixels, indices = windows(images[rows], centres[rows], side, rng)
        with torch.autocast(device, torch.bfloat16):
            features = features_of(model, pixels.to(device), indices.to(device))
            logits, helped = model.head(features[:, 0]).float(), helper(features[:, 1:].mean(1)).float()
        target = targets[rows].to(device)
        loss = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.05)
        total = loss + 0.5 * torch.nn.functional.cross_entropy(helped, target, label_smoothing=0.05)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += 0.05 * (loss.item() - running)
        if step % 50 == 49:
            print(f"step {step + 1}/{len(schedule)} side {side} loss {running:.4f} {time.time() - started:.0f} s", flush=True)
        if step % 200 == 199:
            part = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "helper": helper.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": rng.get_state(),
                    "step": step + 1,
                },
                part,
            )
            part.replace(checkpoint)

    half = {name: value.half() for name, value in model.state_dict().items()}
    model.load_state_dict({name: value.float() for name, value in half.items()})
    top1 = evaluate(model, args.eval_images, device)
    record = {
        "architecture": ARCHITECTURE,
        "data": "digits",
        "seed": args.seed,
        "stages": args.stages,
        "train_images": args.images,
        "optimizer": args.opt,
        "lr": args.lr,
        "test_images": args.eval_images,
        "test_top1": top1,
        "data_config": DATA_CONFIG,
        "labels": list(CLASSES),
    }
    save_file(half, args.output, metadata={"patchslim": json.dumps(record)})
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(f"top-1 {top1:.2f} % on {args.eval_images} test images; wrote {args.output}")


if __name__ == "__main__":
    main()
