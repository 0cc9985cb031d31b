"""The login server's side: spawner, session endpoints, pages."""
