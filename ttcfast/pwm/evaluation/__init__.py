"""Evaluation of world models: errors of imagination and parameter parity."""
