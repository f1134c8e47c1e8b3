"""Locks between jobs and signals that end them; only the standard library is used (layer 1)."""
