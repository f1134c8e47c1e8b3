"""Names and commands that error texts recommend, and the text of nnU-Net's that tells one of its errors from another."""

from __future__ import annotations

DEFAULT_PLANNER = "DiffusionPlanner"
PLANS_OF = {
    DEFAULT_PLANNER: "nnUNetDiffusionPlans",
    "DiffusionPlannerResEncM": "nnUNetDiffusionResEncUNetMPlans",
    "DiffusionPlannerResEncL": "nnUNetDiffusionResEncUNetLPlans",
}
"""Our planners -> the default name of their plans."""


def preprocess_command(dataset_name: str, plans_name: str, configuration: str) -> str:
    """Return the command that preprocesses a configuration anew; `dataset_name` is DatasetXXX_NAME."""
    return f"nnUNetv2_preprocess -d {int(dataset_name[7:10])} -plans_name {plans_name} -c {configuration}"


def says_not_found(error: Exception) -> bool:
    """Whether nnU-Net's search for a trainer ended without one; else a file on its way failed to import."""
    return "Could not find requested" in str(error)
