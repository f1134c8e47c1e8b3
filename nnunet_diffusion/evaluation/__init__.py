"""Metrics, paired comparison of models and corrupted starts (layer 3)."""
