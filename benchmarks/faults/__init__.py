"""What is left of a bundle when a command is killed, interrupted, raced or short of disk: ``python -m benchmarks.faults``."""
