"""``python -m benchmarks.latency``, the short name of ``benchmarks.speed.latency``."""

import sys

from benchmarks.speed.latency import main

if __name__ == "__main__":
    sys.exit(main())
