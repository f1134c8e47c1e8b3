"""Pictures that show what a diffusion segmentation did (layer 3)."""
