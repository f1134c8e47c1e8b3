"""Docker images of trained models: what is written to build one, and what runs in it."""
