"""``patchslim``: every door under one name, with the doors' options, messages and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from export.console import COMMANDS, main, usage
from patchslim.packages import DISTRIBUTION, installed_version
from tests.helpers.bundles import make_bundle
from tests.helpers.commands import door_here, kept_signals

ROOT = Path(__file__).parents[2]
DOORS = {"export": "export.run", "slim": "slimming.run", "cut": "graph_passes.run", "validate": "validate.run"}


def patchslim(*arguments: str) -> subprocess.CompletedProcess[str]:
    return door_here([sys.executable, "-m", "export.console", *arguments])


def test_help_lists_every_command_with_one_line() -> None:
    done = patchslim("--help")
    assert done.returncode == 0
    assert {name: COMMANDS[name].module for name in DOORS} == DOORS
    for name, command in COMMANDS.items():
        assert f"  {name:<10}{command.summary}" in done.stdout.splitlines()
    assert max(map(len, usage().splitlines())) <= 100


def test_help_imports_no_door() -> None:
    loaded = "name for name in sys.modules if name.endswith('.run') or name == 'tyro'"
    code = f"import sys, export.console as console; console.main(['--help']); print(*({loaded}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""


def test_version() -> None:
    done = patchslim("--version")
    assert (done.returncode, done.stdout) == (0, f"{DISTRIBUTION} {installed_version(DISTRIBUTION)}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Commands:"),
        (["exprot"], "patchslim: no command exprot; did you mean export?"),
        (["xyzzy"], "patchslim: no command xyzzy; there are export, slim, cut, build, validate, diff, doctor"),
        (["--modle"], "patchslim: no command --modle"),
    ],
)
def test_a_wrong_command_is_exit_code_2(arguments: list[str], said: str) -> None:
    done = patchslim(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize("name", DOORS)
def test_a_command_shows_the_options_of_its_door(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    here, there = patchslim(name, "--help"), door_here([sys.executable, "-m", DOORS[name], "--help"])
    assert here.returncode == there.returncode == 0
    assert here.stdout.startswith(f"usage: patchslim {name} [-h]")
    assert sum(line.startswith(f"  patchslim {name} ") for line in here.stdout.splitlines()) == 2
    options = [text[text.index("show this help") :] for text in (here.stdout, there.stdout)]
    assert options[0] == options[1]


def test_messages_begin_with_the_command(tmp_path: Path) -> None:
    done = patchslim("cut", str(tmp_path / "no.onnx"), "--passes", "fold_constants")
    assert done.returncode == 3
    assert done.stderr.startswith("patchslim cut: ")
    done = patchslim("export", "--engine", "trtt")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "patchslim export: --engine trtt; did you mean trt?"


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_faults_of_a_bundle_begin_with_the_command(tmp_path: Path, more: list[str]) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model.onnx").write_bytes(b"")
    done = patchslim("validate", str(bundle), *more)
    assert done.returncode == 3
    assert done.stderr
    assert all(line.startswith("patchslim validate: ") for line in done.stderr.splitlines())


def test_validate_checks_a_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle")
    assert patchslim("validate", str(tmp_path / "bundle"), "--threads", "1", "--latency-seconds", "0").returncode == 0
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"not what was promised")
    assert patchslim("validate", str(tmp_path / "bundle")).returncode == 3


def test_main_takes_its_arguments_from_the_caller_too(capsys: pytest.CaptureFixture[str]) -> None:
    with kept_signals(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["pytest"])
        assert main(["cut", "--list"]) == 0
    assert "fold_constants:" in capsys.readouterr().out
