"""The image platform's files and catalogue, and who may reach them."""
