"""Trains process reward models: losses, configuration, training runs, validation, training on a reward's own rollouts."""
