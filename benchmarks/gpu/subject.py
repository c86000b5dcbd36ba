"""What the benchmarks on a GPU measure: the committed ViT-Ti on CIFAR-10, unless they are told otherwise."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal, Self

from benchmarks.accuracy.rows import SubjectOptions, TableOptions

#: A model for ``--tiny``, as arguments of ``timm.create_model``.
TINY_MODEL = ("img_size=48", "patch_size=16", "embed_dim=48", "depth=6", "num_heads=3", "num_classes=10")


@dataclasses.dataclass(frozen=True)
class GpuSubject(SubjectOptions):
    """The options that these benchmarks share."""

    name: str = "cifar10-vit_ti-gpu"
    """What the results are called."""
    model: str = "vit_tiny_patch16_224"
    """A preset or any timm model name."""
    weights: str = "benchmarks/accuracy/cifar10_vit_ti.safetensors"
    """bundled, pretrained, random or a weights file."""
    data: str = "cifar10-test.tar"
    """Held-out images: digits, a folder, FILE.tar, hfds/NAME or wds/PATH."""
    train_data: str = "cifar10-train.tar"
    """Images that plans are made from; where something is trained, a tar of class folders of 32 px images."""
    eval_images: int | None = None
    """How many held-out images; None is all."""
    threads: int = os.cpu_count() or 1
    """Threads of PyTorch on the CPU."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where PyTorch runs."""
    output: Path = Path("results.json")
    """The JSON file of results; what else is made lies beside it."""
    tiny: bool = False
    """A random small model, few images and the CPU instead: a test of the command, no measurement."""

    def of_tables(self) -> TableOptions:
        """The options of the accuracy tables that load the same model, images and plans."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(SubjectOptions)}
        return TableOptions(
            **(shared | {"calibration_data": self.calibration_data or self.train_data}),
            train_data=self.train_data,
            seeds=(0,),
            batch_size=8 if self.tiny else 250,
            device=self.device,
            output=self.beside("tables.json"),
        )

    def beside(self, name: str) -> Path:
        """A path beside the results, called after them."""
        return self.output.with_name(f"{self.output.stem}-{name}")

    def smallest(self) -> Self:
        """What ``--tiny`` stands for."""
        return dataclasses.replace(
            self,
            name="tiny",
            model="vit_tiny_patch16_224",
            model_arg=TINY_MODEL,
            weights="random",
            eval_images=16,
            calibration_images=8,
            budgets=(0.4,),
            threads=1,
            device="cpu",
        )
