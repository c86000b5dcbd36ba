"""Reads a Dockerfile's instructions, and follows one stage's as far as that goes without a container."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str
    arguments: str


def instructions(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, without comments."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(" ", 1)) for line in joined.splitlines()]


def stage(text: str, name: str) -> list[Instruction]:
    """The instructions of the stage ``name``."""
    found: list[Instruction] = []
    inside = False
    for each in instructions(text):
        if each.name == "FROM":
            inside = each.arguments.endswith(f" AS {name}")
        elif inside:
            found.append(each)
    assert found, f"no stage {name}"
    return found


class Rehearsal:
    """Runs a stage's commands in the folder ``root``, which stands for ``/``; on PATH are ``bin_folder`` and the system's.

    ``context`` is the build's. What changes the machine itself (``useradd`` and the like) is left out; ``left_out`` has it.
    """

    def __init__(self, root: Path, context: Path, bin_folder: Path) -> None:
        self.root, self.context = root, context
        self.environment = {"PATH": f"{bin_folder}{os.pathsep}/usr/bin{os.pathsep}/bin", "HOME": str(root)}
        self.environment |= {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "UV_", "SSL_"))}
        self.folder, self.left_out = root, list[str]()

    def follow(self, steps: list[Instruction], change: Callable[[str], str] = lambda command: command) -> str:
        """Follow COPY, ENV, ARG, WORKDIR and RUN; ``change`` is given each command. Returns what the commands printed."""
        printed = ""
        for step in steps:
            if step.name == "WORKDIR":
                self.folder = self._place(step.arguments)
                self.folder.mkdir(parents=True, exist_ok=True)
            elif step.name in ("ENV", "ARG"):
                self.environment |= dict(pair.split("=", 1) for pair in step.arguments.split(" ") if "=" in pair)
            elif step.name == "COPY":
                self._copy(*step.arguments.split(" "))
            elif step.name == "RUN":
                printed += self._run(change(step.arguments))
        return printed

    def _place(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.folder / path

    def _copy(self, *arguments: str) -> None:
        *sources, target = arguments
        for source in sources:
            path, to = self.context / source, self._place(target)
            if path.is_dir():
                shutil.copytree(path, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to = to / path.name if target.endswith("/") else to
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)

    def _run(self, command: str) -> str:
        parts = command.split(" && ")
        kept = [part for part in parts if not part.strip().startswith(("useradd", "chown", "mkdir /"))]
        self.left_out += [part for part in parts if part not in kept]
        text = re.sub(r"(?<=\s)/(app|bundle|models)\b", lambda found: f"{self.root}/{found[1]}", " && ".join(kept))
        done = subprocess.run(
            ["/bin/sh", "-euc", text], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr
