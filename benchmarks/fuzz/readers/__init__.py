"""The readers that are fuzzed, a module for each kind of file; each lists its ``TARGETS``."""
