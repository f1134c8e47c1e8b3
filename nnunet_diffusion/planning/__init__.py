"""Plans for nnU-Net and the denoiser beside it: what both need, the rules that size them, the planners' common part."""
