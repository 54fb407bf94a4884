"""What learns: one file per network."""
