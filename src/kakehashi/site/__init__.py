"""What runs at a site outside of sessions: the agent in front of its scheduler."""
