"""A session's way to the store: one verified reader with two faces."""
