"""The pictures beside the golden inputs: what the rule makes of them is what is stored.

Pictures and rules that do not fit are in the corpus of hostile bundles (tests/helpers/attacks).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.bundles import PREPROCESSING, make_bundle, reseal
from validate import check_bundle
from validate.images import preprocess

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def test_pictures_give_their_tensors(good: Path) -> None:
    (found,) = [check for check in check_bundle(good, threads=1).checks if check.name == "preprocessing"]
    assert (found.status, found.detail) == ("passed", "the rule makes the golden inputs of 3 pictures, bit for bit")


def test_a_bundle_of_before(bundle: Path) -> None:
    """It has neither pictures nor a rule: valid, and what was not checked is said."""
    shutil.rmtree(bundle / "golden")
    reseal(bundle, golden_images=[], preprocessing=PREPROCESSING.model_copy(update={"rule": None}))
    verdict = check_bundle(bundle, threads=1)
    assert verdict.passed
    (found,) = [check for check in verdict.checks if check.name == "preprocessing"]
    assert found.status == "not executed"
    assert "holds no pictures" in found.detail


def test_the_program_of_the_docs(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "golden_images" in code]
    program = code.replace("bundles/vit_ti-trt", str(good))
    exec(program, {"preprocess": lambda image: preprocess(image, PREPROCESSING)})
    told = capsys.readouterr().out.splitlines()
    assert told == [f"golden/{row}.png 0.0" for row in range(3)]
