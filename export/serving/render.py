"""Writes ``serving/`` into a bundle's folder."""

from __future__ import annotations

import json
from pathlib import Path

from export.serving.facts import ServingFacts, serving_facts
from validate.manifest import Manifest

_FILES = Path(__file__).parent / "files"
_TEMPLATE, _PART = ".jinja", ".inc."
#: What needs a rule of preprocessing, which images of 2 or 4 channels have none of.
_OF_PICTURES = ("classify.py", "classify.cpp", "deepstream/")


def write_serving(manifest: Manifest, folder: Path) -> None:
    """Write every file of ``serving/`` into the bundle in ``folder``, as its manifest says; raises ``OSError``."""
    facts = serving_facts(manifest)
    for name, text in serving_files(facts).items():
        path = folder / "serving" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def serving_files(facts: ServingFacts) -> dict[str, str]:
    """The text of each file by its path in ``serving/``; the same facts give the same bytes."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # nothing here is HTML; what a stranger may name is quoted by the template
    )
    environment.filters["quoted"] = json.dumps  # a string of Python, C++, YAML and protobuf's text alike
    rule = facts.preprocessing.rule or facts.preprocessing.derived_rule()
    files = {}
    for path in sorted(_FILES.rglob("*")):
        name = path.relative_to(_FILES).as_posix()
        if not path.is_file() or "__pycache__" in name or _PART in name or (rule is None and name.startswith(_OF_PICTURES)):
            continue
        if name.endswith(_TEMPLATE):
            text = environment.get_template(name).render(facts=facts, rule=rule, spec=facts.preprocessing)
        else:
            text = path.read_text(encoding="utf-8")
        files[name.removesuffix(_TEMPLATE)] = text
    return files
