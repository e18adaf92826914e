"""What every command needs around its work: errors, atomic files, checkpoints, logs, provenance, progress."""
