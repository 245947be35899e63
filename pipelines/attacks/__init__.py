"""Attacks that need a diffusers pipeline."""
