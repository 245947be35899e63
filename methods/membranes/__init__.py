"""Membranes: low-rank adapters that a gate opens, packed, fitted in closed form, read and written."""
