"""Options of the benchmarks that measure one fold of a trained model on its validation cases."""

from __future__ import annotations

import argparse
from pathlib import Path


def model_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that `cli.models.with_validation_cases` reads; the first line describes it."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add = parser.add_argument
    add("-m", type=Path, required=True, help="model folder")
    add("-f", default="0", help="fold")
    add("-chk", default="checkpoint_final.pth")
    add("-device", default="cuda")
    add("--cases", type=int)
    return parser
