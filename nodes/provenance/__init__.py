"""Provenance in ComfyUI."""
