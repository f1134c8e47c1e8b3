"""Where process, denoiser and pre-segmentor meet: the segmenter, its objective and settings; no nnU-Net (layer 2)."""
