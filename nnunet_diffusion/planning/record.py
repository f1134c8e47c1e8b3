"""Record of how plans were made: one dictionary per configuration, next to nnU-Net's own entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

RECORD_KEY = "diffusion_plan"
VERSION = 1
GB = 10**9
STOCK_TARGETS_GB = {
    "ExperimentPlanner": 8.0,
    "ResEncUNetPlanner": 8.0,
    "nnUNetPlannerResEncM": 8.0,
    "nnUNetPlannerResEncL": 24.0,
    "nnUNetPlannerResEncXL": 40.0,
}
"""Default memory targets of nnU-Net's planners, whose plans do not contain the target."""


@dataclass(frozen=True)
class PlanRecord:
    """Target and estimates of one configuration; `configurations.<name>.diffusion_plan` in the plans.

    Attributes:
        planner: name of the planner class.
        memory_target_gb: memory target of each network's training step, in 10^9 bytes.
        step_seconds: time budget of a training step; 0 if only memory was limited.
        machine: machine on which the time was measured; empty without a time budget.
        nnunet_step_seconds: measured time of nnU-Net's training step; 0 without a time budget.
        denoiser_step_seconds: measured time of DiffusionTrainer's training step; 0 without a time budget.
        nnunet_gb: estimated memory of nnU-Net's training step in half precision (float32 with a time budget).
        denoiser_gb: estimated memory of DiffusionTrainer's training step in the same precision.
        nnunet_fp32_gb: estimated memory of nnU-Net's training step in float32.
        denoiser_fp32_gb: estimated memory of DiffusionTrainer's training step in float32.
        stock_patch_size: patch size that nnU-Net's own rules choose at this target.
        stock_batch_size: batch size that nnU-Net's own rules choose at this target.
        version: version of this record's layout.
    """

    planner: str
    memory_target_gb: float
    step_seconds: float
    machine: str
    nnunet_step_seconds: float
    denoiser_step_seconds: float
    nnunet_gb: float
    denoiser_gb: float
    nnunet_fp32_gb: float
    denoiser_fp32_gb: float
    stock_patch_size: tuple[int, ...]
    stock_batch_size: int
    version: int = VERSION

    def to_plans(self) -> dict[str, Any]:
        """Return the record as a JSON-serialisable dictionary."""
        return {**asdict(self), "stock_patch_size": list(self.stock_patch_size)}

    @classmethod
    def from_plans(cls, configuration: Mapping[str, Any]) -> PlanRecord | None:
        """Return the record of a resolved configuration; None for plans of other planners.

        Raises:
            ValueError: the version differs, or an entry is missing, unknown or of the wrong type. The message names it.
        """
        record = configuration.get(RECORD_KEY)
        if record is None:
            return None
        if not isinstance(record, Mapping):
            raise ValueError(f"{RECORD_KEY} in the plans must be a dictionary, got {record!r}.")
        if record.get("version") != VERSION:
            raise ValueError(
                f"{RECORD_KEY}.version is {record.get('version')!r}, this nnunet-diffusion reads {VERSION}: install a "
                "newer one, or plan again with nnunet_diffusion plan."
            )
        known = {entry.name for entry in fields(cls)}
        wrong = sorted(known ^ set(record))
        if wrong:
            raise ValueError(f"{RECORD_KEY}.{wrong[0]} is {'missing' if wrong[0] in known else 'unknown'}: plan again.")
        for entry in fields(cls):
            _check(entry.name, record[entry.name])
        return cls(**{**record, "stock_patch_size": tuple(record["stock_patch_size"])})


def _check(key: str, value: Any) -> None:
    """Raise ValueError if an entry of the record has the wrong type or range."""
    if key in ("planner", "machine"):
        fits, wanted = isinstance(value, str), "text"
    elif key in ("stock_batch_size", "version"):
        fits, wanted = _is_count(value), "a whole number of at least 1"
    elif key == "stock_patch_size":
        fits = isinstance(value, (list, tuple)) and len(value) in (2, 3) and all(map(_is_count, value))
        wanted = "two or three whole numbers of at least 1"
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits, wanted = number and 0 <= value < float("inf"), "a number of at least 0"
    if not fits:
        raise ValueError(f"{RECORD_KEY}.{key} is {value!r}, but must be {wanted}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def memory_target_gb(plans: Mapping[str, Any], configuration: Mapping[str, Any]) -> float | None:
    """Return the memory target of the plans in GB; None if neither a record nor the planner's name gives it.

    Args:
        plans: the complete plans.
        configuration: resolved configuration.
    """
    record = PlanRecord.from_plans(configuration)
    return record.memory_target_gb if record else STOCK_TARGETS_GB.get(plans.get("experiment_planner_used", ""))
