"""What the commands do: one file for each that has no room of its own."""
