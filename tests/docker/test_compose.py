"""``docker/compose.yaml`` is valid by the compose specification, and what it names is there. No container runs here."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.dockerfiles import instructions

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")


def schema() -> Any:
    """The compose specification's schema, as the package check-jsonschema has it."""
    package = pytest.importorskip("check_jsonschema")
    text = (resources.files(package) / "builtin_schemas" / "vendor" / "compose-spec.json").read_text(encoding="utf-8")
    return json.loads(text)


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(TEXT)


def test_it_is_valid_by_the_specification(compose: Any) -> None:
    validator = jsonschema.validators.validator_for(schema())(schema())
    assert [error.message for error in validator.iter_errors(compose)] == []
    broken = json.loads(json.dumps(compose))
    broken["services"]["server"]["healthcheck"]["intervall"] = "5s"
    assert not validator.is_valid(broken)


def test_each_step_waits_for_the_one_before(compose: Any) -> None:
    waits = {name: service.get("depends_on", {}) for name, service in compose["services"].items()}
    done = {"condition": "service_completed_successfully"}
    assert waits == {
        "export": {},
        "check": {"export": done},
        "repository": {"check": done},
        "server": {"repository": done},
        "load": {"server": {"condition": "service_healthy"}},
    }


def test_it_is_served_to_this_machine_alone_and_hardened(compose: Any) -> None:
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["server"]["ports"])
    for service in compose["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_images_are_built_from_files_and_arguments_that_are_there(compose: Any) -> None:
    for service in compose["services"].values():
        if "build" not in service:
            continue
        path = ROOT / service["build"]["dockerfile"]
        found = instructions(path.read_text(encoding="utf-8"))
        arguments = {each.arguments.partition("=")[0] for each in found if each.name == "ARG"}
        assert set(service["build"]["args"]) <= arguments
        defaults = {each.arguments for each in found if each.name == "ARG"}
        for key, value in service["build"]["args"].items():
            assert f"{key}={re.fullmatch(r'.*:-(.*)}', value)[1]}" in defaults
        if target := service["build"].get("target"):
            assert any(each.name == "FROM" and each.arguments.endswith(f" AS {target}") for each in found)


def test_commands_and_checks_are_those_of_the_images(compose: Any) -> None:
    services = compose["services"]
    load = (ROOT / "docker" / "load.py").read_text(encoding="utf-8")
    assert all(f'"{word}"' in load for word in services["load"]["command"] if word.startswith("--"))
    triton = instructions((ROOT / "docker" / "triton.Dockerfile").read_text(encoding="utf-8"))
    (health,) = [each.arguments for each in triton if each.name == "HEALTHCHECK"]
    assert json.loads(health[health.index("[") :]) == services["server"]["healthcheck"]["test"][1:]
    (command,) = [each.arguments for each in triton if each.name == "CMD"]
    assert json.loads(command) == services["server"]["command"]
    (default,) = [each.arguments.partition("=")[2] for each in triton if each.arguments.startswith("TRITON=")]
    assert services["server"]["image"] == f"${{TRITON:-{default}}}"
