"""How candidates are kept: the best, the best k of a beam, a resampled set, a combination."""
