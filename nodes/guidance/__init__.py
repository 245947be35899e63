"""Safe guidance in ComfyUI."""
