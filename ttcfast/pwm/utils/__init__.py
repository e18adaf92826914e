"""What world models and their training are measured by."""
