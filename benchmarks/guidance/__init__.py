"""Safe guidance, measured: what passes, what is lost, what it costs."""
