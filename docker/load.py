"""Send images to a Triton server from many clients at once and compare every answer: python load.py BUNDLE [HOST:PORT]

Requests are of 1 to 4 golden images of the bundle. Prints one JSON object: requests, images, lost, wrong, seconds and
milliseconds. Needs numpy and tritonclient[grpc,http]. Exit codes: 0 all answered rightly, 5 not so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


def main() -> int:
    """Send the requests and print what came of them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("server", nargs="?", default="localhost:8001", help="default: localhost:8001")
    parser.add_argument("--protocol", choices=["grpc", "http"], default="grpc")
    parser.add_argument("--clients", type=int, default=8, help="that send at once")
    parser.add_argument("--requests", type=int, default=200, help="of all of them together")
    given = parser.parse_args()
    load = Load(given.bundle, given.server, given.protocol)
    start = time.perf_counter()
    with ThreadPoolExecutor(given.clients) as pool:
        shares = [range(first, given.requests, given.clients) for first in range(given.clients)]
        found = [answer for answers in pool.map(load.client, shares) for answer in answers]
    seconds = time.perf_counter() - start
    times = sorted(1000 * taken for _, _, taken in found)
    result = {
        "requests": len(found),
        "images": sum(images for images, _, _ in found),
        "lost": sum(kind == "lost" for _, kind, _ in found),
        "wrong": sum(kind == "wrong" for _, kind, _ in found),
        "seconds": round(seconds, 3),
        "milliseconds": {
            f"p{share}": round(times[min(len(times) * share // 100, len(times) - 1)], 2) for share in (50, 90, 99)
        },
    }
    print(json.dumps(result))
    return 0 if result["requests"] == given.requests and not result["lost"] and not result["wrong"] else 5


class Load:
    """What is sent and what must come back; ``client`` is one of many that send at once."""

    def __init__(self, bundle: Path, server: str, protocol: str) -> None:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        config = (bundle / "serving" / "triton" / "onnxruntime" / "config.pbtxt").read_text(encoding="utf-8")
        self.model = json.loads(next(line for line in config.splitlines() if line.startswith("name: "))[len("name: ") :])
        self.input, self.output = manifest["inputs"][0]["name"], manifest["outputs"][0]["name"]
        self.allowed = [one["max_error"] for one in manifest["onnx"] if one["max_error"] is not None][-1]
        with np.load(bundle / "golden.npz") as golden:
            self.images, self.logits = golden["inputs"], golden["slim_logits"]
        self.server = server
        self.protocol = importlib.import_module(f"tritonclient.{protocol}")

    def client(self, numbers: range) -> list[tuple[int, str, float]]:
        """Send the requests of these numbers, one after the other; returns images, kind of answer and seconds of each."""
        with self.protocol.InferenceServerClient(self.server) as server:
            return [self.request(server, number) for number in numbers]

    def request(self, server: Any, number: int) -> tuple[int, str, float]:
        """Send one request, of images that its number decides."""
        rows = np.random.default_rng(number).integers(0, len(self.images), number % 4 + 1)
        tensor = self.protocol.InferInput(self.input, [len(rows), *self.images.shape[1:]], "FP32")
        tensor.set_data_from_numpy(self.images[rows])
        start = time.perf_counter()
        try:
            logits = server.infer(self.model, [tensor]).as_numpy(self.output)
        except Exception as error:
            print(f"request {number}: {error}", file=sys.stderr)
            return len(rows), "lost", time.perf_counter() - start
        right = logits.shape == self.logits[rows].shape and bool(np.abs(logits - self.logits[rows]).max() <= self.allowed)
        return len(rows), "right" if right else "wrong", time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
