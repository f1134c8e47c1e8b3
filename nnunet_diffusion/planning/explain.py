"""The plans in words: what was chosen, from which value of the fingerprint, by which rule, and what else would cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from nnunet_diffusion.planning.costs import denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.diffusion_planner import DiffusionPlanning
from nnunet_diffusion.planning.record import GB, PlanRecord
from nnunet_diffusion.planning.rules import stage_tokens, width_at
from nnunet_diffusion.planning.time_budget import TimeBudget
from nnunet_diffusion.settings import topology_of

EPOCHS = 1000
ALTERNATIVES = (2, 4, 8, 12, 16)
STEPS_PER_EPOCH = 250 + 50 / 3
"""nnU-Net's training steps, and its validation steps without their backward pass."""
TERA = 10**12


def explanation(planner: DiffusionPlanning, plans: dict[str, Any], device: torch.device) -> str:
    """Return tables of all configurations that were planned.

    Args:
        planner: after `plan_experiment`.
        plans: its result.
        device: on which a few steps are timed for the hours.
    """
    names = [name for name in plans["configurations"] if name in planner.sized]
    return "\n".join(_configuration(planner, plans["configurations"][name], name, device) for name in names)


def _configuration(planner: DiffusionPlanning, configuration: dict[str, Any], name: str, device: torch.device) -> str:
    return f"\n## {name}\n\n{_choices(planner, configuration, name)}\n\n{_alternatives(planner, configuration, name, device)}"


def _choices(planner: DiffusionPlanning, configuration: dict[str, Any], name: str) -> str:
    found, record = planner.sized[name], PlanRecord.from_plans(configuration)
    assert record is not None
    settings, topology = found.settings, topology_of(configuration)
    budget = f"{record.step_seconds:g} s a step" if record.step_seconds else f"{record.memory_target_gb:g} GB"
    stock = f"nnU-Net's own rules at {record.memory_target_gb:g} GB: {list(record.stock_patch_size)}, batch {record.stock_batch_size}"
    sizes = " > ".join("x".join(map(str, size)) for size in stage_tokens(configuration))
    median = [round(float(edge)) for edge in configuration["median_image_size_in_voxels"]]
    measured = "documentation/results.md"
    rows = [
        ("what", "chosen", "from", "rule"),
        ("spacing", _numbers(configuration["spacing"]), "spacings of the fingerprint", "nnU-Net's"),
        ("patch_size", _numbers(configuration["patch_size"]), f"median shape {median}", f"nnU-Net's, both steps within {budget}"),
        ("batch_size", str(configuration["batch_size"]), f"{planner.dataset_json['numTraining']} cases", f"the same; {stock}"),
        ("nnU-Net's width", _numbers(topology["features_per_stage"]), budget, "nnU-Net's; a time budget halves it"),
        ("data_identifier", str(configuration["data_identifier"]), "spacing, normalisation", "nnU-Net's folder where the data are the same"),
        ("features_per_stage", _numbers(settings.features_per_stage), f"{found.sixteenths}/16 of nnU-Net's", f"widest of 2/16 to 16/16 within {budget}"),
        ("sdb_depth", str(settings.sdb_depth), "-", "the paper's"),
        ("attention_tokens", str(settings.attention_tokens), f"stages {sizes}", found.reasons["attention_tokens"][1]),
        ("attention_stages", _numbers(settings.attention_stages), "the same", "where it keeps to that share"),
        ("norm", settings.norm, f"batch {configuration['batch_size']}", "batch statistics from 8 patches on, else instance"),
        ("timesteps, schedule", f"{settings.timesteps}, {settings.schedule}", "-", "the paper's"),
        ("prediction_type", settings.prediction_type, "-", f"best measured, {measured}"),
        ("start_step, steps", f"{settings.start_step}, {settings.steps}", "-", f"best measured, {measured}"),
        ("presegmentation_weight", f"{settings.presegmentation_weight:g}", "-", f"best measured, {measured}"),
        ("ema_decay", f"{settings.ema_decay:g}", f"{EPOCHS} epochs of 250 steps", "last ninth of the steps, at most 10 000"),
        ("learning_rate", f"{settings.learning_rate:g}", "-", f"measured, {measured}"),
        ("memory, nnU-Net", f"{record.nnunet_gb:.2f} GB", f"float32 {record.nnunet_fp32_gb:.2f} GB", "counted, documentation/planning.md"),
        ("memory, denoiser", f"{record.denoiser_gb:.2f} GB", f"float32 {record.denoiser_fp32_gb:.2f} GB", "the same, nnU-Net's weights included"),
    ]  # fmt: skip
    return _table(rows)


def _alternatives(planner: DiffusionPlanning, configuration: dict[str, Any], name: str, device: torch.device) -> str:
    found, heads = planner.sized[name], planner.heads
    channels, batch = planner.channels, int(configuration["batch_size"])
    budget = TimeBudget(1.0, device)
    stock = nnunet_cost(configuration, channels, heads, batch)
    stock_fp32 = nnunet_cost(configuration, channels, heads, batch, amp=False)
    rate = budget.nnunet_rate(configuration, channels, heads)
    rows = [
        (
            "network",
            "width",
            "GB, half precision",
            "GB, float32",
            "TFLOP a step",
            "of nnU-Net's",
            f"hours, {EPOCHS} epochs",
        )
    ]
    rows.append(("nnU-Net", _numbers(topology_of(configuration)["features_per_stage"]), f"{stock.total / GB:.2f}", f"{stock_fp32.total / GB:.2f}", f"{stock.flops / TERA:.3f}", "1.00", _hours(stock.flops / rate)))  # fmt: skip
    rate = budget.denoiser_rate(configuration, found.settings, channels, heads)
    features = tuple(topology_of(configuration)["features_per_stage"])
    for sixteenths in sorted({*ALTERNATIVES, found.sixteenths}):
        settings = dataclasses.replace(found.settings, features_per_stage=width_at(sixteenths, features))
        half, full = (denoiser_cost(configuration, settings, channels, heads, batch, amp=amp) for amp in (True, False))
        mark = " (chosen)" if sixteenths == found.sixteenths else ""
        rows.append((f"denoiser {sixteenths}/16{mark}", _numbers(settings.features_per_stage), f"{half.total / GB:.2f}", f"{full.total / GB:.2f}", f"{half.flops / TERA:.3f}", f"{half.flops / stock.flops:.2f}", _hours(half.flops / rate)))  # fmt: skip
    where = "GPU" if device.type == "cuda" else "CPU"
    note = f"Hours on this machine's {where}, from a few steps on small patches without loading and augmentation; those of other widths by FLOPs."
    return f"{_table(rows)}\n\n{note}"


def _hours(step_seconds: float) -> str:
    hours = step_seconds * STEPS_PER_EPOCH * EPOCHS / 3600
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{float(value):.4g}" for value in values)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose columns stand in line in a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
