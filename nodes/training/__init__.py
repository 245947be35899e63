"""Training membranes on a ComfyUI model."""
