"""What `plan` prints: one table, and what planning cost nnU-Net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.planning.diffusion_planner import DiffusionPlanning
from nnunet_diffusion.planning.record import PlanRecord
from nnunet_diffusion.settings import topology_of


def summary(planner: DiffusionPlanning, plans: Mapping[str, Any]) -> str:
    """Return the configurations that were planned, what was taken from nnU-Net's own choice, and the next commands."""
    rows, notes = [], []
    for name, configuration in plans["configurations"].items():
        record = PlanRecord.from_plans(configuration)
        if name not in planner.sized or record is None:
            continue
        found = planner.sized[name]
        rows.append([name, _sizes(configuration["patch_size"]), str(configuration["batch_size"]), _sizes(topology_of(configuration)["features_per_stage"]), _sizes(found.settings.features_per_stage), f"{record.nnunet_gb:.2f}", f"{record.denoiser_gb:.2f}", f"{found.cost.flops / 1e12:.3f}"])  # fmt: skip
        patch = tuple(configuration["patch_size"])
        if (patch, configuration["batch_size"]) != (record.stock_patch_size, record.stock_batch_size):
            notes.append(
                f"{name}: nnU-Net alone would get patch {_sizes(record.stock_patch_size)}, batch {record.stock_batch_size} at "
                f"{record.memory_target_gb:g} GB."
            )
    if planner.dataset_json["numTraining"] < 5:
        notes.append(
            f"{planner.dataset_json['numTraining']} training cases are too few for five folds: train with fold all."
        )
    head = [
        "configuration",
        "patch",
        "batch",
        "nnU-Net's width",
        "denoiser's width",
        "nnU-Net GB",
        "denoiser GB",
        "TFLOP a step",
    ]
    number, name = int(plans["dataset_name"][7:10]), plans["plans_name"]
    commands = f"Next: nnUNetv2_preprocess -d {number} -plans_name {name} -c CONFIG, then nnUNetv2_train {number} CONFIG FOLD -tr DiffusionTrainer -p {name}"
    return "\n".join([markdown_table(head, rows), *notes, commands])


def _sizes(values: Any) -> str:
    return " ".join(str(int(value)) for value in values)
