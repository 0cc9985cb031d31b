"""The session wrapper on the compute node: standard library only."""
