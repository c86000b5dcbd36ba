"""``python -m export.build BUNDLE/recipe.json -o FOLDER``: a device builds its own engine, without PyTorch."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE
from patchslim.text import printable

if TYPE_CHECKING:
    from export.engine_from_recipe import BuiltEngine
    from export.engines.base import BackendName, BuildProgress

EXAMPLES = ("bundles/vit_ti-trt/recipe.json -o engine/", "bundles/vit_ti-trt/recipe.json -o engine/ --engine rtx --target sm89")
_BACKENDS: dict[str, BackendName] = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class BuildDoorOptions:
    """Build the engine that a recipe describes on this device, with TensorRT or TensorRT-RTX. Needs no PyTorch."""

    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")]
    """The recipe.json of a bundle. The ONNX file that it names lies beside it."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder that the engine, its list of kernels and build.json are written to, whole or not at all."""
    engine: Literal["trt", "rtx"] | None = None
    """trt: TensorRT, for this machine's GPU. rtx: TensorRT-RTX. Default: the first that is here and has its GPU."""
    target: Annotated[
        tyro.conf.UseAppendAction[tuple[tuple[str, ...] | str, ...]],
        tyro.conf.arg(metavar="portable|sm75|sm80|sm86|sm89|sm120|sm121"),
    ] = ()
    """GPU generations to build for. Default: the one of this machine; where it has none, those of the recipe."""
    refit: bool = False
    """Build an engine that can be given other weights, also where the recipe does not say so. Needs a GPU."""
    strip_weights: bool = False
    """Leave the weights out of the engine file, also where the recipe does not say so. Needs a GPU."""
    json: bool = False
    """Print build.json on stdout; logs stay on stderr."""

    @property
    def targets(self) -> tuple[str, ...]:
        """``--target``, one name each, however they were given."""
        groups = ((group,) if isinstance(group, str) else group for group in self.target)
        return tuple(name for group in groups for word in group for name in word.split(",") if name)


def run(options: BuildDoorOptions) -> int:
    """Build the engine and say what it came to; returns the exit code. Raises ``PatchslimError``."""
    from export.engine_from_recipe import RecipeBuild, build_recipe
    from patchslim.progress import Reporter

    backend = None if options.engine is None else _BACKENDS[options.engine]
    reporter = Reporter()
    with reporter.alive(), reporter.bar("building", unit="") as update:

        def progress(report: BuildProgress) -> bool:
            if report.parent is None:
                update(report.step, report.total)
            return True

        asked = RecipeBuild(options.recipe, options.output, backend, options.targets, options.refit, options.strip_weights)
        built = build_recipe(asked, progress)
    if built.doubt:
        print(f"build: {printable(built.doubt)}: not checked", file=sys.stderr)
    if options.json:
        print(json.dumps(built.record.model_dump(mode="json"), indent=1))
    else:
        print_built(built, options.recipe.parent)
    return EXIT_DONE


def print_built(built: BuiltEngine, bundle: Path) -> None:
    """What was built, where it lies, and the next step: real images through it."""
    print(built.result.summary())
    for file in built.record.files:
        print(f"{file.sha256}  {printable(str(built.folder / file.path))}")
    next_step = shlex.join(["python", "-m", "validate.run", str(bundle), "--build", "--built", str(built.folder), "--data"])
    print(f"before you serve it, run it on images of your own, one folder per class: {printable(next_step)} IMAGES")


def main(prog: str = "python -m export.build") -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    description = BuildDoorOptions.__doc__ or ""
    return run_command(BuildDoorOptions, run, prog=prog, description=description, extra="edge", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
