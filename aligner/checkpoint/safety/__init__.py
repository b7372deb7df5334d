"""What protects checkpoints: hashes of their files, and the names that a run wrote."""
