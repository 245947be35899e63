"""Attacks on pictures in ComfyUI."""
