"""Safe guidance on diffusers pipelines."""
