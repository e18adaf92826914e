"""The process reward model: a network that scores candidates, what it is trained on, and its training."""
