"""The mark beside its peers."""
