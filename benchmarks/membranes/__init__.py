"""Time of membranes beside their peers."""
