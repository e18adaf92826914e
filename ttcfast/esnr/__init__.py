"""The signal-to-noise ratio of gradients: from stacked gradients, over microbatches of a training step, and from ghost norms."""
