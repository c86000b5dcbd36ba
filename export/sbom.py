"""``sbom.cdx.json``: the Python environment that made a bundle, as CycloneDX. The same environment gives the same bytes."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from export.source import ModelFacts
from export.stages import Workspace
from validate.bundle import SBOM

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License

_LONGEST_LICENCE = 100  # characters: some distributions give a whole text as their licence's name
_CLASSIFIER = "License :: "


def environment_sbom(model: ModelFacts, work: Workspace) -> Path:
    """The bill of materials of ``model`` in this environment, made anew where anything was installed or removed."""
    folder = work.cache.path("sbom", model=(model.architecture, model.weights_sha256), installed=_installed())

    def build(part: Path) -> None:
        work.reporter.say("writing the bill of materials")
        (part / SBOM).write_text(render(model.architecture, model.weights_sha256), encoding="utf-8")

    work.cache.make(folder, build)
    return folder / SBOM


def _installed() -> list[str]:
    """What says which distributions are installed, without reading any: the names of their folders, and Python's version."""
    found = {
        name
        for place in sys.path
        if os.path.isdir(place)
        for name in os.listdir(place)
        if name.endswith((".dist-info", ".egg-info"))
    }
    return [platform.python_version(), *sorted(found)]


def render(model: str, weights_sha256: str) -> str:
    """CycloneDX 1.6 in JSON: the model, and every distribution that is installed, with its licence and what it requires.

    There is no time in it, and its serial number is made of what it says.
    """
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    components, requires = _environment()
    subject = Component(
        name=model,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=weights_sha256)],
    )
    python = Component(name="python", version=platform.python_version(), type=ComponentType.PLATFORM, bom_ref="python")
    about = BomMetaData(component=subject)
    about.timestamp = None  # type: ignore[assignment]  # the same environment, the same bytes

    def bom(number: UUID) -> Bom:
        made = Bom(serial_number=number, components=[python, *components.values()], metadata=about)
        made.register_dependency(subject, [python, *components.values()])
        for name, component in components.items():
            made.register_dependency(component, [components[each] for each in requires[name]])
        return made

    said = _text(JsonV1Dot6(bom(UUID(int=0))).output_as_string(indent=1))
    number = UUID(bytes=hashlib.sha256(said.encode()).digest()[:16], version=5)
    return _text(JsonV1Dot6(bom(number)).output_as_string(indent=1))


@functools.cache
def _environment() -> tuple[dict[str, Component], dict[str, list[str]]]:
    """The installed distributions as components, and what each requires of the others, by name."""
    found = {_normal(one.metadata["Name"]): one for one in metadata.distributions() if one.metadata["Name"]}
    requires = {name: _required(name, one, found) for name, one in found.items()}
    return {name: _component(found[name]) for name in sorted(found)}, requires


def _text(rendered: str) -> str:
    return rendered.rstrip("\n") + "\n"


def _component(distribution: metadata.Distribution) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    name, version = distribution.metadata["Name"], distribution.version
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=f"{_normal(name)}=={version}",
        purl=PackageURL("pypi", name=_normal(name), version=version),
        licenses=list(_licences(distribution)),
    )


def _licences(distribution: metadata.Distribution) -> Iterator[License]:
    """An SPDX expression, or the names that the metadata have."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression

    about = distribution.metadata.json
    if expression := about.get("license_expression"):
        yield LicenseExpression(value=str(expression))
        return
    stated = str(about.get("license") or "").strip()
    names = {each.rpartition(" :: ")[2] for each in about.get("classifier") or [] if each.startswith(_CLASSIFIER)}
    if stated and len(stated) <= _LONGEST_LICENCE and "\n" not in stated and not names:
        names = {stated}
    for name in sorted(names):
        yield DisjunctiveLicense(name=name)


def _required(name: str, distribution: metadata.Distribution, installed: Iterable[str]) -> list[str]:
    """What the distribution ``name`` requires here without any of its extras, of what is installed."""
    from packaging.requirements import InvalidRequirement, Requirement

    found = set()
    for text in distribution.requires or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of an old distribution
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.add(_normal(requirement.name))
    return sorted(found & set(installed) - {name})


def _normal(name: str) -> str:
    """A distribution's name as indexes have it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
