"""Serve a repository with the Triton of the wheel nvidia-pytriton, without a container: python serve.py REPOSITORY

Needs the packages of requirements.txt in the environment of this Python. Runs until it is interrupted, and then ends the
server. Exit codes: 0 ended when asked to, 2 wrong options, 4 the server cannot run here or did not start.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from importlib import metadata, util
from pathlib import Path
from typing import NoReturn

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
GRACE = 20  # seconds that the server has to answer what it has begun


def main() -> int:
    """Start the server, say when it is ready, and stay until one of the two is ended; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="made by make_repository.py --backend python")
    parser.add_argument("--address", default="127.0.0.1", help="127.0.0.1 serves this machine alone, 0.0.0.0 every other")
    for name, port in PORTS.items():
        parser.add_argument(f"--{name}-port", type=int, default=port)
    parser.add_argument("--timeout", type=float, default=120, help="seconds that the models may take to load")
    given = parser.parse_args()
    if not any(given.repository.glob("*/config.pbtxt")):
        parser.error(f"{given.repository}: holds no model: make_repository.py {given.repository} --backend python makes one")
    ports = {name: getattr(given, f"{name}_port") for name in PORTS}
    for name, port in ports.items():
        ensure_free(given.address, name, port)
    server = find_server()
    with tempfile.TemporaryDirectory(prefix="triton-") as folder:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupted)
        log = Path(folder) / "log"
        try:
            process = start(server, given.repository, given.address, ports, Path(folder), log)
        except OSError as error:
            fail(f"the server cannot be started: {error}")
        try:
            wait_until_ready(process, f"http://{given.address}:{ports['http']}", given.timeout, log)
            print(
                f"ready: http {ports['http']}, grpc {ports['grpc']}, metrics {ports['metrics']} on {given.address}", flush=True
            )
            code = process.wait()
            return failed(f"the server ended with {code}", log)
        except KeyboardInterrupt:
            return 0
        finally:
            end(process)


def interrupted(number: int, frame: object) -> NoReturn:
    """A signal ends the wait as Ctrl-C does."""
    raise KeyboardInterrupt


def ensure_free(address: str, name: str, port: int) -> None:
    """End with 4 where another program has the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address, port))
        except (OSError, OverflowError) as error:
            fail(f"--{name}-port {port}: cannot be used on {address} ({error}): pass another one")


def find_server() -> Path:
    """The folder ``tritonserver`` of the wheel; ends with 4 where something is missing here."""
    try:
        numpy = metadata.version("numpy")
        metadata.version("onnxruntime")
        found = util.find_spec("pytriton")
    except metadata.PackageNotFoundError as error:
        fail(f"{error.name} is not installed: pip install -r {Path(__file__).with_name('requirements.txt')}")
    if found is None or found.origin is None:
        fail(f"nvidia-pytriton is not installed: pip install -r {Path(__file__).with_name('requirements.txt')}")
    if int(numpy.partition(".")[0]) >= 2:
        fail(f"NumPy {numpy} and this server do not work together, arrays would arrive empty: pip install 'numpy<2'")
    return Path(found.origin).parent / "tritonserver"


def start(
    server: Path, repository: Path, address: str, ports: dict[str, int], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start the server with a Python backend that runs this Python; its output goes to ``log``."""
    backends = folder / "backends"
    shutil.copytree(server / "backends", backends)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        fail(f"this server has no Python backend for Python {version}: use one of 3.11 to 3.13")
    (backends / "python" / stub.name).unlink(missing_ok=True)
    shutil.copy(stub, backends / "python")
    libraries = [str(server.parents[1] / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    command = [str(server / "bin" / "tritonserver"), f"--model-repository={repository.resolve()}"]
    command += [f"--backend-directory={backends}", "--exit-on-error=true", "--disable-auto-complete-config"]
    for name, port in ports.items():
        command += [f"--{name}-address={address}", f"--{name}-port={port}"]
    environment = os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, libraries)), "PATH": ":".join(filter(None, paths))}
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with_parent
        )


def end_with_parent() -> None:
    """Have Linux end this process when the one that started it is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def wait_until_ready(process: subprocess.Popen[bytes], url: str, timeout: float, log: Path) -> None:
    """Return when every model answers; ends with 4 where the server ends or takes longer than ``timeout`` seconds."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if process.poll() is not None:
            sys.exit(failed(f"the server did not start: it ended with {process.returncode}", log))
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).status == 200:
                return
        time.sleep(0.2)
    sys.exit(failed(f"the server was not ready after {timeout:g} seconds", log))


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, and end it and its children where it does not."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failed(message: str, log: Path) -> int:
    """Print the message and what the server's log has of errors, or else its end; returns exit code 4."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith(("E", "error:"))]
    print("\n".join((errors or lines)[-30:]), file=sys.stderr)
    print(f"error: {message}; the server's own words are above", file=sys.stderr)
    return 4


def fail(message: str) -> NoReturn:
    """End with 4: the server cannot run here."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(4)


if __name__ == "__main__":
    sys.exit(main())
