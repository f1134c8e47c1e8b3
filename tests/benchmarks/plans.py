r"""What the planners choose at several memory targets: the tables of plans in documentation/experiments/plans.md.

    python tests/benchmarks/plans.py --workdir W --targets 1 4 8 24 \
        --datasets DATA/Dataset004_Hippocampus DATA/Dataset105_BUSI
    python tests/benchmarks/plans.py --workdir W --large-ct --targets 8 24 80 --planners DiffusionPlanner

Nothing is trained. The plans stay in W/nnUNet_preprocessed, for memory.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from comparison_plans import Folders, enter_workdir, set_up_folders
from fingerprint_dataset import write_fingerprint_dataset

PLANNERS = ("DiffusionPlanner", "DiffusionPlannerResEncM", "DiffusionPlannerResEncL")
LARGE_CT = "Dataset777_LargeCT"
COLUMNS = (
    "dataset",
    "planner",
    "target GB",
    "configuration",
    "patch",
    "batch",
    "nnU-Net's width",
    "denoiser's width",
    "sdb_depth",
    "attention: tokens, stages",
    "nnU-Net GB",
    "denoiser GB",
    "nnU-Net TFLOP",
    "denoiser TFLOP",
    "nnU-Net's own plan",
)


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--datasets", type=Path, nargs="+", default=[], help="raw datasets")
    parser.add_argument(
        "--large-ct", action="store_true", help="a made-up fingerprint: 100 CT of about 550 x 512 x 512"
    )
    parser.add_argument("--targets", type=float, nargs="+", default=[8], metavar="GB")
    parser.add_argument("--planners", nargs="+", default=PLANNERS, choices=PLANNERS)
    parser.add_argument("--processes", type=int, default=2, help="for the fingerprints")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = read_options()
    work = options.workdir.resolve()
    names = [set_up_folders(path, work).dataset for path in options.datasets]
    if options.large_ct:
        names.append(write_large_ct(work))
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset

    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in names:
        if not (Folders(work, name).preprocessed / "dataset_fingerprint.json").is_file():
            with contextlib.redirect_stdout(io.StringIO()):
                extract_fingerprint_dataset(int(name[7:10]), num_processes=options.processes)
        for planner in options.planners:
            for target in options.targets:
                for row in plan(name, planner, target):
                    print(f"| {' | '.join((name[11:], planner, f'{target:g}', *row))} |", flush=True)


def write_large_ct(work: Path) -> str:
    """Write the dataset of a made-up fingerprint and return its name."""
    folders = enter_workdir(work, LARGE_CT)
    if not folders.raw.exists():
        slices = np.random.default_rng(0).integers(400, 700, 100)
        shapes = [(number, 512, 512) for number in slices]
        labels = ("background", "liver", "spleen", "left kidney", "right kidney")
        write_fingerprint_dataset(folders.raw, folders.preprocessed, shapes, (1.0, 0.8, 0.8), labels=labels)
    return LARGE_CT


def plan(dataset: str, planner: str, target: float) -> list[list[str]]:
    """Plan a dataset and return the table's cells, one row per configuration."""
    from nnunet_diffusion.model.settings import topology_of
    from nnunet_diffusion.planning.costs import nnunet_cost
    from nnunet_diffusion.planning.diffusion_planner import TargetTooSmall
    from nnunet_diffusion.planning.record import PlanRecord

    made_by = getattr(importlib.import_module(f"nnunet_diffusion.planners.{planner}"), planner)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            made = made_by(dataset, target, plans_name=f"{planner}{target:g}GB")
            plans = made.plan_experiment()
        except TargetTooSmall as error:
            return [[f"refused: {error}", *[""] * (len(COLUMNS) - 4)]]
    rows = []
    for name, sized in made.sized.items():
        configuration = plans["configurations"][name]
        settings, record = sized.settings, PlanRecord.from_plans(configuration)
        batch, patch = configuration["batch_size"], configuration["patch_size"]
        same = (tuple(patch), batch) == (record.stock_patch_size, record.stock_batch_size)
        rows.append(
            [
                name,
                numbers(patch, " x "),
                str(batch),
                numbers(topology_of(configuration)["features_per_stage"]),
                f"{numbers(settings.features_per_stage)} ({sized.parts}/32)",
                str(settings.sdb_depth),
                f"{settings.attention_tokens}, {numbers(settings.attention_stages)}",
                f"{record.nnunet_gb:.2f}",
                f"{record.denoiser_gb:.2f}",
                f"{nnunet_cost(configuration, made.channels, made.heads, batch).flops / 1e12:.3f}",
                f"{sized.cost.flops / 1e12:.3f}",
                "the same" if same else f"{numbers(record.stock_patch_size, ' x ')}, {record.stock_batch_size}",
            ]
        )
    return rows


def numbers(values: Iterable[float], between: str = " ") -> str:
    """Whole numbers in one cell."""
    return between.join(str(int(value)) for value in values)


if __name__ == "__main__":
    main()
