"""The keyed mark in ComfyUI."""
