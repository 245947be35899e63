"""The marks of others, as baselines with exact p-values."""
