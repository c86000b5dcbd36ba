"""The JSON Schemas in docs/schemas are those of the code, and real files satisfy them."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundles import make_bundle

ROOT = Path(__file__).parents[2]
MAKER: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "make_schemas.py"))


def committed(name: str) -> Any:
    return json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", MAKER["SCHEMAS"])
def test_committed_schema_is_current(name: str) -> None:
    current = json.loads(MAKER["render"](name))
    assert committed(name) == current, "run `uv run python docs/make_schemas.py` and commit docs/schemas"


def test_no_other_schema_is_committed() -> None:
    names = {path.name.removesuffix(".schema.json") for path in (ROOT / "docs" / "schemas").iterdir()}
    assert names == set(MAKER["SCHEMAS"])


NOT_IN_EVERY_BUNDLE = {"attestation", "build", "latency", "latency_table", "passes_report"}


@pytest.mark.parametrize("name", sorted({*MAKER["SCHEMAS"]} - NOT_IN_EVERY_BUNDLE))
def test_a_written_file_has_the_fields_of_its_schema(name: str, tmp_path: Path) -> None:
    written = json.loads((make_bundle(tmp_path / "bundle") / f"{name}.json").read_text(encoding="utf-8"))
    schema = committed(name)
    assert set(written) <= set(schema["properties"])
    assert set(schema["required"]) <= set(written)
    assert schema["additionalProperties"] is False
