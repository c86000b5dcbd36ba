"""A real Triton server serves the bundle, on this machine alone: right answers under load, clear failures, nothing left behind.

The server is that of the wheel nvidia-pytriton, in an environment of its own, made as ``serving/README.md`` says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.serving import bundle_with_serving

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
#: What uv says when no package index answers; anything else that it says is a failure of ours.
UNREACHABLE = ("dns error", "error sending request", "failed to fetch", "connection refused", "timed out", "network")
CLIENTS, REQUESTS = 12, 240


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_with_serving(tmp_path_factory.mktemp("serving") / "tiny")


@pytest.fixture(scope="module")
def python(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with what ``serving/triton/requirements.txt`` names, and Pillow for the client."""
    uv, environment = shutil.which("uv"), tmp_path_factory.mktemp("triton") / "environment"
    if uv is None:
        pytest.skip("uv is not on PATH")
    requirements = bundle / "serving" / "triton" / "requirements.txt"
    for command in (
        [uv, "venv", "--python", "3.11", str(environment)],
        [uv, "pip", "install", "--python", str(environment / "bin" / "python"), "-r", str(requirements), "pillow"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode and any(word in done.stderr.lower() for word in UNREACHABLE):
            pytest.skip(f"nvidia-pytriton cannot be fetched from here: {' '.join(done.stderr.split())[:300]}")
        assert done.returncode == 0, done.stderr
    return str(environment / "bin" / "python")


@pytest.fixture(scope="module")
def repository(bundle: Path, python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    maker = bundle / "serving" / "triton" / "make_repository.py"
    subprocess.run([python, str(maker), str(folder), "--backend", "python"], check=True, timeout=60)
    return folder


def free_ports() -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        return [each.getsockname()[1] for each in sockets]


def serve(python: str, bundle: Path, repository: Path, ports: list[int], **more: object) -> subprocess.Popen[str]:
    names = ("http", "grpc", "metrics")
    options = [text for name, port in zip(names, ports, strict=True) for text in (f"--{name}-port", str(port))]
    command = [python, str(bundle / "serving" / "triton" / "serve.py"), str(repository), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def descendants(pid: int) -> set[int]:
    """Every process that ``pid`` started, and those that these started."""
    found: set[int] = set()
    parents = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    waiting = [pid]
    while waiting:
        above = waiting.pop()
        new = {child for child, parent in parents.items() if parent == above} - found
        found |= new
        waiting.extend(new)
    return found


def gone(pids: set[int], seconds: float = 30) -> set[int]:
    """Those of ``pids`` that are still there after at most ``seconds``; dead ones that nobody waited for do not count."""
    until = time.monotonic() + seconds
    while (left := {pid for pid in pids if alive(pid)}) and time.monotonic() < until:
        time.sleep(0.1)
    return left


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def ports(python: str, bundle: Path, repository: Path) -> Iterator[list[int]]:
    """Ports of a running server, which must end well in the end, with everything that it started."""
    ports = free_ports()
    process = serve(python, bundle, repository, ports)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: "), process.communicate(timeout=30)
        started = descendants(process.pid)
        assert len(started) >= 2  # the server and its Python
        yield ports
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert gone(started) == set()


def run(python: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def metrics(port: int) -> dict[str, float]:
    """Triton's counters of requests."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(nv_inference_request_(?:success|failure))\{.*\} (\S+)$", text, flags=re.MULTILINE):
        found[name] = found.get(name, 0) + float(value)
    return found


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_golden_logits_come_back(protocol: str, python: str, bundle: Path, ports: list[int]) -> None:
    port, more = (ports[0], []) if protocol == "http" else (ports[1], ["--grpc"])
    done = run(python, bundle / "serving" / "check_server.py", f"127.0.0.1:{port}", *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("as it should be: 10 images")


def test_the_client_of_the_bundle_is_answered_as_without_a_server(python: str, bundle: Path, ports: list[int]) -> None:
    command = [bundle / "serving" / "classify.py", bundle / "golden" / "2.png"]
    answers = [run(python, *command, *server) for server in ([], [f"127.0.0.1:{ports[0]}"])]
    assert answers[0].stdout.count("\n") == 3
    assert answers[0].stdout == answers[1].stdout, answers[1].stderr


def test_what_is_not_the_models_answer_is_exit_code_5(python: str, bundle: Path, ports: list[int], tmp_path: Path) -> None:
    other = bundle_with_serving(tmp_path / "tiny")
    script = other / "serving" / "check_server.py"
    script.write_text(script.read_text().replace('golden["slim_logits"]', 'golden["slim_logits"] + 1'))
    done = run(python, script, f"127.0.0.1:{ports[0]}")
    assert (done.returncode, done.stdout.split(":")[0]) == (5, "OTHER ANSWERS")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_many_clients_lose_no_request_and_get_no_wrong_answer(
    protocol: str, python: str, bundle: Path, ports: list[int]
) -> None:
    before = metrics(ports[2])
    server = f"127.0.0.1:{ports[0] if protocol == 'http' else ports[1]}"
    options = ["--protocol", protocol, "--clients", CLIENTS, "--requests", REQUESTS]
    done = run(python, ROOT / "docker" / "load.py", bundle, server, *options)
    assert done.returncode == 0, done.stderr + done.stdout
    said = json.loads(done.stdout)
    assert (said["requests"], said["lost"], said["wrong"]) == (REQUESTS, 0, 0)
    after = metrics(ports[2])
    assert after["nv_inference_request_success"] - before["nv_inference_request_success"] == REQUESTS
    assert after["nv_inference_request_failure"] == before["nv_inference_request_failure"]


def test_a_client_that_goes_away_disturbs_nobody(python: str, bundle: Path, ports: list[int]) -> None:
    for port in ports[:2]:
        with socket.create_connection(("127.0.0.1", port)) as lost:
            lost.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n{")
    load = subprocess.Popen([python, ROOT / "docker" / "load.py", bundle, f"127.0.0.1:{ports[1]}", "--requests", "100000"])
    time.sleep(3)
    load.kill()
    load.wait()
    test_golden_logits_come_back("http", python, bundle, ports)
    test_golden_logits_come_back("grpc", python, bundle, ports)


def test_a_port_in_use_is_said(python: str, bundle: Path, repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = serve(python, bundle, repository, [*free_ports()[:1], port, *free_ports()[:1]])
        _, error = process.communicate(timeout=60)
    assert process.returncode == 4
    assert f"--grpc-port {port}: cannot be used on 127.0.0.1" in error


def test_no_room_for_the_servers_files_is_said(python: str, bundle: Path, repository: Path) -> None:
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    command = [python, bundle / "serving" / "triton" / "serve.py", repository, "--http-port", str(free_ports()[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.returncode == 4
    assert "the server cannot be started: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_does_not_start_says_why_and_leaves_no_process(
    python: str, bundle: Path, repository: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(repository, broken)
    (broken / "tiny" / "1" / "model.onnx").write_bytes(b"not a model")
    process = serve(python, bundle, broken, free_ports())
    _, error = process.communicate(timeout=120)
    assert process.returncode == 4
    assert "model.onnx" in error
    assert "the server did not start" in error
    assert gone(descendants(process.pid)) == set()
    assert not [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and str(broken) in command_line(entry)]


def command_line(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().decode(errors="replace")
    return ""


def test_a_killed_launcher_takes_the_server_with_it(python: str, bundle: Path, repository: Path) -> None:
    process = serve(python, bundle, repository, free_ports())
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready: ")
    started = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert started
    assert gone(started, 60) == set()
