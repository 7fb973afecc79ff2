"""Makes data directories of text and of pairs."""
