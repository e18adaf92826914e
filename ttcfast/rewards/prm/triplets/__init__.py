"""Triplets (best, median and worst of K candidates): making them, storing them, reading them in batches."""
