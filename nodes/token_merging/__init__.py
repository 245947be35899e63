"""Negative token merging in ComfyUI."""
