"""The keyed mark: keys, fields, code, exact statistics, detection."""
