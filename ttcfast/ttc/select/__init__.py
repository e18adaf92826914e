"""Selects candidates: the best, the best k of the beams, a resampled set, or a combination."""
