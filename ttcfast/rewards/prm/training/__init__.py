"""Training of process reward models: losses, configuration, the loop, validation, training on a reward's own rollouts."""
