"""Measures of world models, and classes named in configurations."""
