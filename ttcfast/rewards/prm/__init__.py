"""The process reward model: triplets of candidates, networks that score them, and their training."""
