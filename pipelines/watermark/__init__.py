"""The keyed mark on diffusers pipelines."""
