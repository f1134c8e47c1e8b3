"""What keeps jobs apart and ends them: locks and signals, by the standard library alone (layer 1)."""
