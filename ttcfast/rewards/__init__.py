"""Rewards: what candidates are chosen by."""
