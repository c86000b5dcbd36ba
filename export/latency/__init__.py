"""Latency tables: blocks taken out of a model and timed on an engine."""
