"""The packages that patchslim can use, the extra that brings each, and how that is installed. Imports none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: The distribution whose extras these are.
DISTRIBUTION = "patchslim"


@dataclass(frozen=True)
class Package:
    """One package: the module that is imported, the distribution that brings it, and the extras that ask for that."""

    module: str
    distribution: str
    extras: tuple[str, ...]

    @property
    def version(self) -> str | None:
        """What is installed, by its metadata: nothing is imported; None where it is missing.

        Of whichever distribution brings the module: ``onnxruntime-gpu`` and ``tensorrt-cu12`` are as good as those listed.
        """
        if missing([self.module]):
            return None
        from importlib.metadata import packages_distributions

        others = [] if installed_version(self.distribution) else packages_distributions().get(self.module, [])
        return next(filter(None, map(installed_version, [self.distribution, *others])), "unknown")


#: In the order in which ``patchslim doctor`` lists them.
PACKAGES = (
    Package("torch", "torch", ("export",)),
    Package("torchvision", "torchvision", ("export",)),
    Package("timm", "timm", ("export",)),
    Package("accelerate", "accelerate", ("export",)),
    Package("safetensors", "safetensors", ("export",)),
    Package("patchslim_digits", "patchslim-digits", ("export",)),
    Package("onnx", "onnx", ("edge", "export")),
    Package("onnxscript", "onnxscript", ("export",)),
    Package("onnx_graphsurgeon", "onnx-graphsurgeon", ("edge", "export")),
    Package("onnxruntime", "onnxruntime", ("edge", "export")),
    Package("tensorrt_rtx", "tensorrt-rtx-cu13", ("rtx",)),
    Package("tensorrt", "tensorrt-cu13", ("trt",)),
    Package("openvino", "openvino", ("openvino",)),
    Package("nncf", "nncf", ("nncf",)),
    Package("modelopt", "nvidia-modelopt", ("modelopt",)),
    Package("cppimport", "cppimport", ("modelopt",)),
    Package("lief", "lief", ("modelopt",)),
    Package("pynvml", "nvidia-ml-py", ("modelopt",)),
    Package("onnxconverter_common", "onnxconverter-common", ("modelopt",)),
    Package("onnxslim", "onnxslim", ("modelopt",)),
    Package("polygraphy", "polygraphy", ("modelopt",)),
    Package("ml_dtypes", "ml-dtypes", ("export",)),
    Package("PIL", "pillow", ("edge", "export")),
    Package("scipy", "scipy", ("edge", "export")),
    Package("sklearn", "scikit-learn", ("export",)),
    Package("matplotlib", "matplotlib", ("export",)),
    Package("jinja2", "jinja2", ("export",)),
    Package("cyclonedx", "cyclonedx-python-lib", ("export",)),
    Package("packaging", "packaging", ("export",)),
    Package("model_signing", "model-signing", ("signing",)),
    Package("OpenSSL", "pyopenssl", ("signing",)),
    Package("datasets", "datasets", ("readers",)),
    Package("webdataset", "webdataset", ("readers",)),
)


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is missing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def missing(modules: Iterable[str]) -> list[str]:
    """Those of ``modules`` that are not installed; none is imported."""

    def installed(module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            return False

    return [module for module in modules if not installed(module)]


def install_command(extra: str) -> str:
    """The pip command that installs an extra: in the checkout that this code is part of, else from the wheels' files.

    No package index has these distributions.
    """
    if not (Path(__file__).parents[1] / "pyproject.toml").is_file():
        return wheel_command(extra, str(installed_version(DISTRIBUTION)))
    return _command(extra, ".", "./weights")


def wheel_command(extra: str, version: str) -> str:
    """The pip command that installs an extra from our wheel's file, for a machine that has no checkout."""
    return _command(extra, f"./patchslim-{version}-py3-none-any.whl", "./patchslim_digits-*.whl")


def _command(extra: str, ours: str, digits: str) -> str:
    both = any(package.module == "patchslim_digits" and extra in package.extras for package in PACKAGES)
    return " ".join(["pip install", *([digits] if both else []), f'"{ours}[{extra}]"'])


def extra_for(module: str, preferred: str) -> str | None:
    """The extra that brings ``module`` or the package that it is in: ``preferred`` where that one does.

    None where no extra does: then a missing module is a bug.
    """
    extras = next((package.extras for package in PACKAGES if package.module == module.partition(".")[0]), ())
    return preferred if preferred in extras else next(iter(extras), None)
