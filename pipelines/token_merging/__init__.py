"""Negative token merging on diffusers pipelines."""
