"""Entry point of the console command `nnunet_diffusion`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnunet_diffusion import __version__
from nnunet_diffusion.cli import (
    calibrate,
    container,
    crossval,
    demo,
    diagnose,
    doctor,
    ensemble,
    evaluate,
    explain,
    figures,
    install,
    plan,
    predict,
    sweep,
    train,
    trainers_directory,
    tune,
)
from nnunet_diffusion.cli.errors import CommandError

SUBCOMMANDS = (
    trainers_directory,
    plan,
    train,
    crossval,
    predict,
    ensemble,
    evaluate,
    explain,
    diagnose,
    tune,
    calibrate,
    sweep,
    figures,
    install,
    container,
    doctor,
    demo,
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command. Each module adds its own subcommand."""
    parser = argparse.ArgumentParser(
        prog="nnunet_diffusion", description="Diffusion segmentation for nnU-Net v2: PGDiffSeg with few-step PD-DDPM."
    )
    parser.add_argument("--version", action="version", version=f"nnunet_diffusion {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words after the command's name; None for the arguments of this process.

    Returns:
        0 on success, 1 if a check failed, 2 on wrong input (one line on standard error names the error and the cure).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # the arguments of `train` are parsed by nnU-Net's own parser, never by ours
        if words[:1] == ["train"]:
            return train.run(words[1:])
        options = build_parser().parse_args(words)
        return options.run(options)
    except CommandError as error:
        print(f"nnunet_diffusion {words[0]}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
