"""The embedded model in ComfyUI."""
