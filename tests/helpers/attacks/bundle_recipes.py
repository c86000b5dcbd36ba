"""Attacks on ``recipe.json``, which a device executes: paths out of its folder, other files, commands, odd numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchslim.files import digest
from tests.helpers.attacks.bundles import Change, add

#: Name, change of the record (None: the text that follows is the whole file), words of the refusal.
RECIPE_ATTACKS: list[tuple[str, Change | str, tuple[str, ...]]] = [
    ("empty", "", ("empty",)),
    ("of brackets", "[" * 100_000, ("Invalid JSON",)),
    ("of a megabyte", '"' + "a" * (1 << 20) + '"', ("allowed",)),
    ("that is a list", "[]", ("object",)),
    ("with an unknown field", lambda r: r.update(command="rm"), ("command",)),
    ("without an ONNX file", lambda r: r.pop("onnx"), ("onnx",)),
    ("of version true", lambda r: r.update(schema_version=True), ("schema_version",)),
    ("of version 2", lambda r: r.update(schema_version=2), ("schema_version",)),
    ("with another command", lambda r: r.update(trtexec=r["trtexec"] + "; rm -rf /"), ("trtexec",)),
    ("of NaN images", lambda r: r["profiles"][0].update(max=float("nan")), ("profiles",)),
    ("of a batch of 0", lambda r: r["profiles"][0].update(min=0), ("profiles",)),
    ("of batches upside down", lambda r: r["profiles"][0].update(min=9), ("profiles", "min <= opt <= max")),
    ("of two profiles", lambda r: r["profiles"].append(r["profiles"][0]), ("profiles",)),
    ("without a profile", lambda r: r["profiles"].clear(), ("profiles",)),
    ("of five axes", lambda r: r["input"]["shape"].append(3), ("input",)),
    ("of images of any size", lambda r: r["input"]["shape"].__setitem__(3, "batch"), ("input",)),
    ("of int4", lambda r: r["settings"].update(precision="int4"), ("precision",)),
    ("of fp32 in TF32", lambda r: _in_tf32(r), ("tf32",)),
    ("of level 9", lambda r: r["settings"].update(optimization_level=9), ("optimization_level",)),
    ("of no workspace", lambda r: r["settings"].update(workspace_mib=0), ("workspace_mib",)),
    ("for a GPU that is a path", lambda r: r["settings"].update(compute_capabilities=["../sm89"]), ("compute_capabilities",)),
    ("for one GPU twice", lambda r: r["settings"].update(compute_capabilities=["sm89"] * 2), ("compute_capabilities",)),
    ("of more fusions than attentions", lambda r: r["expected"].update(fused_attentions=99), ("fused attentions",)),
    *(
        (f"of the file {path!r}", lambda r, path=path: r["onnx"].update(path=path), ("onnx", "plain relative path"))  # type: ignore[misc]
        for path in ("../model.onnx", "/etc/passwd", "a/../../b", "a\\b", "", "a\nb")
    ),
]


def _in_tf32(record: dict[str, Any]) -> None:
    record["settings"].update(precision="fp32", tf32=True)
    record["expected"].update(precision="fp32")


def damaged(path: Path, change: Change | str) -> None:
    """Change the recipe at ``path`` in place."""
    if isinstance(change, str):
        path.write_text(change)
        return
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def in_bundle(bundle: Path, change: Change | str) -> None:
    """Change a bundle's recipe, and give the manifest its new size and digest, as who can write the folder does."""
    recipe = bundle / "recipe.json"
    damaged(recipe, change)

    def renew(record: dict[str, Any]) -> None:
        entry = next(file for file in record["files"] if file["path"] == recipe.name)
        entry.update(size=recipe.stat().st_size, sha256=digest(recipe))

    damaged(bundle / "manifest.json", renew)


def add_recipe(name: str, change: Change | str, *words: str) -> None:
    """Add an attack on the recipe of a bundle."""
    add(f"a recipe {name}", 3, ("recipe.json", *words), lambda bundle: in_bundle(bundle, change))


for _name, _change, _words in RECIPE_ATTACKS:
    add_recipe(_name, _change, *_words)
add_recipe("of another digest", lambda r: r["onnx"].update(sha256="0" * 64), "SHA-256 of model.onnx")
add_recipe("of another size", lambda r: r["onnx"].update(size=1), "size and SHA-256")
add_recipe("of another input", lambda r: _renamed(r, "pixels"), "input")


def _renamed(record: dict[str, Any], name: str) -> None:
    """Another name of the input, with the command that it gives."""
    old = record["input"]["name"]
    record["input"]["name"] = name
    record["trtexec"] = record["trtexec"].replace(f"={old}:", f"={name}:")


def _other_file(record: dict[str, Any]) -> None:
    record["onnx"]["path"] = "plan.onnx"
    record["trtexec"] = record["trtexec"].replace("model.", "plan.")


add_recipe("of a file that is no graph of the bundle", _other_file, "plan.onnx is no ONNX file")
