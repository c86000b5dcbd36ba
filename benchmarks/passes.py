"""``python -m benchmarks.passes``, the short name of ``benchmarks.speed.passes``."""

import sys

from benchmarks.speed.passes import main

if __name__ == "__main__":
    sys.exit(main())
