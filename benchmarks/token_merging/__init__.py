"""Negative token merging, judged and timed."""
