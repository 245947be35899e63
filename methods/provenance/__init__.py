"""What a picture file says of its origin, and whether it fits together."""
