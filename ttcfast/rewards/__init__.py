"""Rewards: scorers by which a search chooses among candidates."""
