"""Write the JSON Schemas of the project's files into docs/schemas: ``python docs/make_schemas.py``."""

from __future__ import annotations

import json
from pathlib import Path

from graph_passes.report import report_schema
from patchslim.latency_table import latency_table_schema
from patchslim.plan import plan_schema
from validate.attestation import attestation_schema
from validate.build_recipe import recipe_schema
from validate.built_engine import build_schema
from validate.latency_sheet import latency_sheet_schema
from validate.manifest import manifest_schema
from validate.parity_records import parity_schema

FOLDER = Path(__file__).parent / "schemas"
SCHEMAS = {
    "plan": plan_schema,
    "manifest": manifest_schema,
    "parity": parity_schema,
    "latency": latency_sheet_schema,
    "latency_table": latency_table_schema,
    "recipe": recipe_schema,
    "build": build_schema,
    "attestation": attestation_schema,
    "passes_report": report_schema,
}


def render(name: str) -> str:
    """The text of ``NAME.schema.json`` as the code has it now."""
    return json.dumps(SCHEMAS[name](), indent=2) + "\n"


if __name__ == "__main__":
    for name in SCHEMAS:
        (FOLDER / f"{name}.schema.json").write_text(render(name), encoding="utf-8")
