"""Flow-matching world models for policy learning."""
