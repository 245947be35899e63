"""Measured side by side with the peers; the numbers in the README come from `results/`."""
