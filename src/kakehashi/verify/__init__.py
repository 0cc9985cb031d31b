"""A canary session, and the search for whatever it may have left."""
