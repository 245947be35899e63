"""Membranes on diffusers pipelines."""
