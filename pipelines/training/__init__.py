"""Training membranes on a loaded pipeline."""
