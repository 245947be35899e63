"""Membranes: low-rank adapters that a gate opens, stacked, fitted in closed form, read and written."""
