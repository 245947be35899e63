"""Membranes by gradient: the objective, what is drawn for it, and the loop."""
