"""Triplets (best, median and worst of K candidates): building, the file, reading batches."""
