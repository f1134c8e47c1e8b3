"""The device on which a command runs."""

from __future__ import annotations

from nnunet_diffusion.cli.errors import CommandError

DEVICES = ("cuda", "cpu", "mps")


def check_device(device: str) -> None:
    """Raise CommandError if `device` is unknown, or not available on this machine or in this build of torch."""
    import torch

    if device not in DEVICES:
        raise CommandError(f"-device is {device}; choose one of: {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            "-device is cuda (the default), but torch finds no CUDA GPU; add -device cpu, or run: nnunet_diffusion doctor"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise CommandError("-device is mps, but torch finds no Apple GPU; add -device cpu")
