"""Membranes in ComfyUI."""
