"""nnU-Net's folders, as its variables name them."""

from __future__ import annotations

from collections.abc import Mapping

from nnunet_diffusion.cli.errors import CommandError

RESULTS = "nnUNet_results"


def folder_in(environment: Mapping[str, str], name: str, otherwise: str = "") -> str:
    """Value of one of nnU-Net's variables.

    Raises:
        CommandError: it is not set; says how to, and `otherwise` what else helps.
    """
    if not environment.get(name):
        raise CommandError(f"{name} is not set; run: export {name}=/path/to/{name}{otherwise}")
    return environment[name]
