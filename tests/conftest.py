"""What the tests of the export share: one work folder, so that stages are made once, and two finished bundles."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist fills the cores with tests; set before torch is imported

if sys.dont_write_bytecode:  # PYTHONDONTWRITEBYTECODE: every process that a test starts would compile torch and timm anew
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

if TYPE_CHECKING:
    from export.pipeline import Outcome


def pytest_configure(config: pytest.Config) -> None:
    """One folder for what the run makes once (tests/helpers/made_once.py); pytest-xdist's processes inherit its name."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="patchslim-tests-")
        os.environ["PATCHSLIM_TEST_FILES"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process takes all of a file, for its fixtures, and all tests of the export, for their work folder.

    pytest-xdist's own ``--dist loadgroup`` renames tests, which pytest 9.2 does not take notice of.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "export" if file.startswith("tests/export/") else file

    return ByFile(config, log)


def pytest_collection_finish() -> None:
    """Python's collector need not walk over what the tests import, which stays, nor so often over what an export makes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain of what is not collected in the end


@pytest.fixture(scope="session", autouse=True)
def _torchlib_is_read_once() -> None:
    """torch.onnx.export parses the source of all its operators at each call, for a second; the answer is always the same."""
    if "torch" in sys.modules:
        with contextlib.suppress(ImportError, AttributeError):  # without these private names it is only slower
            from torch.onnx._internal._lazy_import import onnxscript_apis

            onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)


@pytest.fixture(scope="session")
def export_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export") / "work"


@pytest.fixture(scope="session")
def ort_export(export_work: Path) -> Outcome:
    from export import export_bundle
    from tests.helpers.exports import tiny

    return export_bundle(tiny(export_work, "tiny-ort"))


@pytest.fixture(scope="session")
def trt_export(export_work: Path) -> Outcome:
    pytest.importorskip("tensorrt_rtx")
    from export import export_bundle
    from tests.helpers.exports import tiny

    return export_bundle(tiny(export_work, "tiny-trt", engine="trt", target=("sm89",)))


@pytest.fixture(scope="session")
def several_export(export_work: Path) -> Outcome:
    pytest.importorskip("openvino")
    from export import export_bundle
    from tests.helpers.exports import tiny

    return export_bundle(tiny(export_work, "several", engine="ort,openvino", precision="fp32"))
