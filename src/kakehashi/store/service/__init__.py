"""The catalogue service: what a session may ask of the catalogue, over HTTP."""
