"""What `plan` prints: one table, and what planning cost nnU-Net."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.planning.costs import nnunet_cost
from nnunet_diffusion.planning.diffusion_planner import DiffusionPlanning
from nnunet_diffusion.planning.record import PlanRecord
from nnunet_diffusion.settings import topology_of

FOLDS = 5
HEAD = (
    "configuration",
    "patch",
    "batch",
    "nnU-Net's width",
    "denoiser's width",
)
MEMORY = ("nnU-Net GB", "denoiser GB", "nnU-Net TFLOP a step", "denoiser TFLOP a step")
TIME = ("nnU-Net s a step", "denoiser s a step", *MEMORY[2:])
LATE = 1.5
"""Times the seconds asked for, what is worth a note."""


def summary(planner: DiffusionPlanning, plans: Mapping[str, Any]) -> str:
    """Return the configurations that were planned, what was taken from nnU-Net's own choice, and the next commands."""
    rows, notes = [], []
    for name, configuration in plans["configurations"].items():
        if name not in planner.sized:  # a user's own, kept from earlier plans of that name
            continue
        record = PlanRecord.from_plans(configuration)
        assert record is not None
        found, patch, batch = planner.sized[name], tuple(configuration["patch_size"]), int(configuration["batch_size"])
        widths = (topology_of(configuration)["features_per_stage"], found.settings.features_per_stage)
        timed = record.step_seconds > 0
        needs = (
            (record.nnunet_step_seconds, record.denoiser_step_seconds)
            if timed
            else (record.nnunet_gb, record.denoiser_gb)
        )
        flops = nnunet_cost(configuration, found.channels, planner.heads, batch, amp=not timed, gpu=not timed).flops
        cells = (*(f"{need:.2f}" for need in needs), f"{flops / 1e12:.3f}", f"{found.cost.flops / 1e12:.3f}")
        rows.append([name, _numbers(patch), str(batch), *map(_numbers, widths), *cells])
        if timed and max(needs) > LATE * record.step_seconds:
            notes.append(
                f"{name}: a training step takes {max(needs):.2f} s instead of {record.step_seconds:g} s; a smaller patch or "
                "narrower networks would learn too little."
            )
        if (patch, batch) != (record.stock_patch_size, record.stock_batch_size):
            notes.append(
                f"{name}: nnU-Net alone would get patch {_numbers(record.stock_patch_size)}, batch "
                f"{record.stock_batch_size} at {record.memory_target_gb:g} GB."
            )
    cases, number, plans_name = (
        planner.dataset_json["numTraining"],
        int(plans["dataset_name"][7:10]),
        plans["plans_name"],
    )
    if cases < FOLDS:
        notes.append(f"{cases} training cases are too few for {FOLDS} folds: train with fold all.")
    device = "" if planner.time_budget is None else " -device cpu"
    notes.append(
        f"Next, for what is not preprocessed: nnUNetv2_preprocess -d {number} -plans_name {plans_name} -c CONFIG"
    )
    notes.append(f"Then: nnUNetv2_train {number} CONFIG FOLD -tr DiffusionTrainer -p {plans_name}{device}")
    head = (*HEAD, *(MEMORY if planner.time_budget is None else TIME))
    return "\n".join([markdown_table(head, rows), *notes])


def _numbers(values: Iterable[float]) -> str:
    return " ".join(str(int(value)) for value in values)
