"""``python -m benchmarks.search_cost``, the short name of ``benchmarks.speed.search_cost``."""

import sys

from benchmarks.speed.search_cost import main

if __name__ == "__main__":
    sys.exit(main())
