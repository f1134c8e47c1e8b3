"""The device that a command is to run on."""

from __future__ import annotations

from nnunet_diffusion.cli.errors import CommandError

DEVICES = ("cuda", "cpu", "mps")


def check_device(device: str) -> None:
    """Raise CommandError if `device` is none, or one that this machine or this torch does not offer."""
    import torch

    if device not in DEVICES:
        raise CommandError(f"-device is {device}; choose one of: {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            "-device is cuda (the default), but torch finds no CUDA GPU; run: nnunet_diffusion doctor, or add: -device cpu"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise CommandError("-device is mps, but torch finds none; add: -device cpu")
