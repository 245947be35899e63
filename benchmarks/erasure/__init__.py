"""How well concepts are erased."""
