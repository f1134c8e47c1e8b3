"""Output of `plan`: a table, notes on changes to nnU-Net's own patch and batch, and the next commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.files import preprocess_command
from nnunet_diffusion.model.settings import HIDIFF, topology_of
from nnunet_diffusion.planning.costs import nnunet_cost
from nnunet_diffusion.planning.diffusion_planner import DiffusionPlanning
from nnunet_diffusion.planning.flops import flops_text
from nnunet_diffusion.planning.record import PlanRecord

FOLDS = 5
HEAD = (
    "configuration",
    "patch",
    "batch",
    "nnU-Net's width",
    "denoiser's width",
)
MEMORY = ("nnU-Net GB", "denoiser GB", "nnU-Net FLOPs a step", "denoiser FLOPs a step")
TIME = ("nnU-Net s a step", "denoiser s a step", *MEMORY[2:])
LATE = 1.5  # a note is printed if a step takes more than this many times the time budget
CPU_EPOCHS = 5


def summary(planner: DiffusionPlanning, plans: Mapping[str, Any]) -> str:
    """Return the table of planned configurations, changes to nnU-Net's own patch and batch, and warnings."""
    rows, notes = [], []
    for name in planned(planner, plans):
        configuration, found = plans["configurations"][name], planner.sized[name]
        record = PlanRecord.from_plans(configuration)
        assert record is not None
        patch, batch = tuple(configuration["patch_size"]), int(configuration["batch_size"])
        widths = (topology_of(configuration)["features_per_stage"], found.settings.features_per_stage)
        timed = record.step_seconds > 0
        needs = (
            (record.nnunet_step_seconds, record.denoiser_step_seconds)
            if timed
            else (record.nnunet_gb, record.denoiser_gb)
        )
        flops = nnunet_cost(configuration, found.channels, planner.heads, batch, amp=not timed, gpu=not timed).flops
        cells = (*(f"{need:.2f}" for need in needs), flops_text(flops), flops_text(found.cost.flops))
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
    if sign := planner.budget.busy():
        notes.append(
            f"WARNING: this machine was busy while training steps were timed ({sign}), so these plans may be smaller than "
            "needed: plan again when the machine is quiet, or give a larger -step_seconds."
        )
    head = (*HEAD, *(TIME if planner.budget.seconds else MEMORY))
    return "\n".join([markdown_table(head, rows), *notes])


def next_commands(
    planner: DiffusionPlanning, plans: Mapping[str, Any], chosen: Sequence[str] | None, *, preprocessed: bool
) -> str:
    """Return the commands to run after planning, for one configuration and fold.

    Args:
        planner: planner after `plan_experiment`.
        plans: its result.
        chosen: configurations given by the user; None for the first planned one.
        preprocessed: whether they have been preprocessed already.
    """
    names, dataset = planned(planner, plans), plans["dataset_name"]
    name = (chosen or names)[0]
    fold = "0" if planner.dataset_json["numTraining"] >= FOLDS else "all"
    words = f"{int(dataset[7:10])} {name} {fold} -p {plans['plans_name']}"
    hidiff = planner.denoiser == HIDIFF
    if not planner.budget.gpu:
        words += f" -tr {'HiDiffTrainer' if hidiff else 'DiffusionTrainerUNet'}_{CPU_EPOCHS}epochs -device cpu"
    elif hidiff:
        words += " -tr HiDiffTrainer"
    lines = ["Next:"] + [f"  {preprocess_command(dataset, plans['plans_name'], name)}"] * (not preprocessed)
    lines.append(f"  nnunet_diffusion train {words}")
    if not planner.budget.gpu and hidiff:
        lines.append(
            f"That trains nnU-Net for {CPU_EPOCHS} epochs, then HiDiff for as many; without _{CPU_EPOCHS}epochs 1000 of each."
        )
    elif not planner.budget.gpu:
        lines.append(
            f"That trains nnU-Net for {CPU_EPOCHS} epochs, then its network as denoiser; without -tr it is PGDiffSeg, and 1000 "
            "epochs of each."
        )
    if fold == "all":
        cases = planner.dataset_json["numTraining"]
        lines.append(f"{cases} training cases are too few for {FOLDS} folds: train with fold all, as above.")
    if others := [other for other in names if other != name]:
        lines.append(f"Other configurations: {', '.join(others)}.")
    return "\n".join(lines)


def planned(planner: DiffusionPlanning, plans: Mapping[str, Any]) -> list[str]:
    """Return the configurations that the planner made; plans may also contain some from earlier plans of that name."""
    return [name for name in plans["configurations"] if name in planner.sized]


def _numbers(values: Iterable[float]) -> str:
    return " ".join(str(int(value)) for value in values)
