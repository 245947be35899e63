"""Negative token merging: push the tokens of a picture away from their matches in another."""
