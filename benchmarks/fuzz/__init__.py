"""Fuzzed files over every reader of files that may come from a stranger: ``python -m benchmarks.fuzz``."""
