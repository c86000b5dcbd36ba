"""Hostile bundles: a good one is damaged, and ``validate`` must end with a stated exit code and say stated words."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchslim.files import digest
from validate.bundle import record_files

Damage = Callable[[Path], Any]
Change = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class BundleAttack:
    """``damage`` changes a good bundle (``tests.helpers.bundles.make_bundle``) in place.

    ``validate.run`` must end with exit code ``code`` within seconds, and its message must have all ``words``. ``timeout`` is
    its ``--timeout``, where that is what ends the attack; ``slow`` says that the damage itself takes long.
    """

    name: str
    code: int
    words: tuple[str, ...]
    damage: Damage
    timeout: float = 300.0
    slow: bool = False


BUNDLE_ATTACKS: list[BundleAttack] = []


def add(name: str, code: int, words: tuple[str, ...], damage: Damage, **more: Any) -> None:
    """Add one attack to the corpus; ``more`` are its other fields."""
    BUNDLE_ATTACKS.append(BundleAttack(name, code, words, damage, **more))


def attack(code: int, *words: str, **more: Any) -> Callable[[Damage], Damage]:
    """Add a function of the bundle's folder as an attack under its own name."""

    def register(damage: Damage) -> Damage:
        add(damage.__name__.replace("_", " "), code, words, damage, **more)
        return damage

    return register


def edit(path: Path, change: Change) -> None:
    """Change a JSON file's object."""
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def seal(bundle: Path, change: Change = lambda record: None) -> None:
    """Give the records sizes and digests of the files as they are, as who can write the folder does; then ``change`` one."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError, RecursionError):  # the recipe may be what is damaged
        recipe = json.loads((bundle / "recipe.json").read_text())
        onnx = bundle / recipe["onnx"]["path"]
        recipe["onnx"].update(size=onnx.stat().st_size, sha256=digest(onnx))
        (bundle / "recipe.json").write_text(json.dumps(recipe))

    def renew(record: dict[str, Any]) -> None:
        record["files"] = [one.model_dump(mode="json") for one in record_files(bundle)]
        record["plan_digest"] = digest(bundle / "plan.json")
        change(record)

    edit(bundle / "manifest.json", renew)


def in_manifest(change: Change) -> Damage:
    """Change the manifest."""
    return lambda bundle: edit(bundle / "manifest.json", change)


def in_plan(change: Change) -> Damage:
    """Change the plan and seal it."""

    def damage(bundle: Path) -> None:
        edit(bundle / "plan.json", change)
        kept = json.loads((bundle / "plan.json").read_text())["kept"]
        seal(bundle, lambda record: record.update(tokens_per_block=[len(each) for each in kept]))

    return damage


def in_both(change: Change) -> Damage:
    """Change what the manifest and the parity report both say, and seal it."""

    def damage(bundle: Path) -> None:
        edit(bundle / "parity.json", change)
        edit(bundle / "manifest.json", change)
        seal(bundle)

    return damage


def replaced(name: str, data: bytes, *, sealed: bool = True) -> Damage:
    """Write other bytes into a file of the bundle."""

    def damage(bundle: Path) -> None:
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(data)
        if sealed:
            seal(bundle)

    return damage
