"""Figures of the reverse process and of training curves (layer 3)."""
