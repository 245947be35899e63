"""What people and adversaries do to pictures and prompts."""
