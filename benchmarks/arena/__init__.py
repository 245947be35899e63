"""The arena: every way to erase against every way to bring a concept back, on worlds where the truth is known."""
