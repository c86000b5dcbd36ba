"""The InferenceService is one by the models of KServe's own package, made from the definitions that its CRD is made from."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.serving import bundle_with_serving, rendered

#: What uv says when no package index answers; anything else that it says is a failure of ours.
UNREACHABLE = ("dns error", "error sending request", "failed to fetch", "connection refused", "timed out", "network")
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object, "ResourceQuantity": str}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_serving(tmp_path_factory.mktemp("serving") / "tiny")


def service(bundle: Path, **changes: Any) -> dict[str, Any]:
    found = yaml.safe_load(rendered(bundle, **changes)["kserve/inferenceservice.yaml"])
    assert isinstance(found, dict)
    return found


def test_it_scales_and_is_ready_when_the_model_is(bundle: Path) -> None:
    found = service(bundle)
    assert (found["apiVersion"], found["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = found["spec"]["predictor"]
    assert predictor["minReplicas"] < predictor["maxReplicas"]
    assert predictor["model"]["readinessProbe"]["httpGet"]["path"] == "/v2/models/tiny/ready"


@pytest.mark.parametrize("name", ["Vit_Ti-ORT", "9lives", 'a"b: {c}\nd', "größe", "x" * 200, "-.-"])
def test_any_name_becomes_one_that_kubernetes_takes(name: str, bundle: Path) -> None:
    found = service(bundle, name=name)["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", found)
    assert len(found) <= 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Of every model of KServe's and Kubernetes' packages its fields' types and their names in YAML; read, not imported."""
    uv, folder = shutil.which("uv"), tmp_path_factory.mktemp("kserve")
    if uv is None:
        pytest.skip("uv is not on PATH")
    command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, "kserve==0.21.0", "kubernetes==31.0.0"], capture_output=True, text=True, timeout=300)
    if done.returncode and any(word in done.stderr.lower() for word in UNREACHABLE):
        pytest.skip(f"KServe's package cannot be fetched from here: {' '.join(done.stderr.split())[:300]}")
    assert done.returncode == 0, done.stderr
    found = {}
    for path in [*(folder / "kubernetes/client/models").glob("*.py"), *(folder / "kserve/models").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                values = {
                    target.id: ast.literal_eval(statement.value)
                    for statement in node.body
                    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict)
                    for target in statement.targets
                    if isinstance(target, ast.Name)
                }
                if {"openapi_types", "attribute_map"} <= values.keys():
                    found[node.name] = values["openapi_types"], values["attribute_map"]
    assert "V1beta1InferenceService" in found
    return found


def faults(value: Any, kind: str, models: dict[str, Any], place: str = "") -> Iterator[str]:
    """What in ``value`` is not of the type ``kind`` of the OpenAPI models."""
    if (inner := re.fullmatch(r"list\[(.*)\]|dict\(str, (.*)\)", kind)) is not None:
        expected, parts = (list, enumerate(value)) if inner[1] else (dict, value.items())
        if not isinstance(value, expected):
            yield f"{place}: not a {expected.__name__}"
            return
        for key, part in parts:
            yield from faults(part, inner[1] or inner[2], models, f"{place}.{key}")
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (kind == "int" and isinstance(value, bool)):
            yield f"{place}: {value!r} is not of type {kind}"
    else:
        types, names = models[kind]
        fields = {names[field]: types[field] for field in types}
        for key, part in value.items():
            if key not in fields:
                yield f"{place}: {kind} has no field {key}"
            else:
                yield from faults(part, fields[key], models, f"{place}.{key}")


@pytest.mark.slow
def test_every_field_is_one_of_kserves_and_of_its_type(bundle: Path, models: dict[str, Any]) -> None:
    found = service(bundle)
    assert list(faults(found, "V1beta1InferenceService", models)) == []
    predictor = found["spec"]["predictor"]
    wrong = [
        (predictor, "maxReplica", 4),
        (predictor, "scaleTarget", "8"),
        (predictor["model"]["readinessProbe"]["httpGet"], "uri", "/"),
        (predictor["model"]["resources"], "requests", {"cpu": 2}),
        (found["metadata"], "annotations", {"plan": 1}),
    ]
    for place, key, value in wrong:
        before = place.copy()
        place[key] = value
        assert len(list(faults(found, "V1beta1InferenceService", models))) == 1, key
        place.clear()
        place.update(before)
