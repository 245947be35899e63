"""The page of results, written from the files."""
