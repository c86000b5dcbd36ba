"""Metadata that are added to an ONNX file are read by ONNX beside those that it has, and nothing else of it changes."""

from __future__ import annotations

from pathlib import Path

import onnx

from graph_passes.onnx_io.metadata import add_metadata
from tests.helpers.onnx_models import dense


def test_entries_are_added_behind_those_that_are_there(tmp_path: Path) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(dense("plain")[1])
    onnx.helper.set_model_props(model, {"first": "1"})
    onnx.save(model, tmp_path / "model.onnx")
    more = {"labels": '["größe", "a\\nb"]', "long": "x" * 100_000, "empty": ""}
    add_metadata(tmp_path / "model.onnx", more)
    found = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(found, full_check=True)
    assert {entry.key: entry.value for entry in found.metadata_props} == {"first": "1"} | more
    del found.metadata_props[1:]
    assert found == model
