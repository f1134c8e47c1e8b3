"""Explanation of plans: each choice, the value it depends on, its rule, and the cost of alternatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from nnunet_diffusion.model.settings import topology_of
from nnunet_diffusion.planning.budgets import TimeBudget
from nnunet_diffusion.planning.costs import Cost, denoiser_cost, nnunet_cost
from nnunet_diffusion.planning.diffusion_planner import DiffusionPlanning
from nnunet_diffusion.planning.flops import flops_text
from nnunet_diffusion.planning.record import GB, PlanRecord
from nnunet_diffusion.planning.rules import stage_tokens, width_at

EPOCHS = 1000
ALTERNATIVES = (4, 8, 16, 24, 32)
STEPS_PER_EPOCH = 250 + 50 / 3  # nnU-Net's training steps; its validation steps have no backward pass
COUNTED = "counted, documentation/planning.md"


def explanation(planner: DiffusionPlanning, plans: dict[str, Any], device: torch.device) -> str:
    """Return the tables of all planned configurations.

    Args:
        planner: planner after `plan_experiment`.
        plans: its result.
        device: device on which a few steps are timed to estimate hours.
    """
    names = [name for name in plans["configurations"] if name in planner.sized]
    return "\n".join(_configuration(planner, plans["configurations"][name], name, device) for name in names)


def _configuration(planner: DiffusionPlanning, configuration: dict[str, Any], name: str, device: torch.device) -> str:
    tables = _choices(planner, configuration, name), _alternatives(planner, configuration, name, device)
    return "\n\n".join((f"\n## {name}", *tables))


def _choices(planner: DiffusionPlanning, configuration: dict[str, Any], name: str) -> str:
    found, record = planner.sized[name], PlanRecord.from_plans(configuration)
    assert record is not None
    settings, topology = found.settings, topology_of(configuration)
    budget = f"{record.step_seconds:g} s a step" if record.step_seconds else f"{record.memory_target_gb:g} GB"
    stock = (
        f"{list(record.stock_patch_size)}, {record.stock_batch_size} by nnU-Net's own at {record.memory_target_gb:g} GB"
    )
    sizes = " > ".join("x".join(map(str, size)) for size in stage_tokens(configuration))
    batch, median = (
        configuration["batch_size"],
        [round(float(edge)) for edge in configuration["median_image_size_in_voxels"]],
    )
    share, count, width = found.reasons["attention_tokens"][1], planner.dataset_json["numTraining"], _numbers
    best = "best measured, documentation/experiments/defaults.md"
    pgdiffseg = [
        (
            "sdb_depth",
            str(settings.sdb_depth),
            budget,
            "the paper's 4; 2 if the width would be below half of nnU-Net's at 4",
        ),
        ("attention_tokens", str(settings.attention_tokens), f"stages {sizes}", share),
        ("attention_stages", width(settings.attention_stages), "the same", "all stages within that share"),
        ("norm", settings.norm, f"batch {batch}", "batch from 8 patches on, else instance"),
    ]
    tokens = ("attention_tokens", str(settings.attention_tokens), "-", share)
    if settings.is_hidiff:
        best = "default, documentation/settings.md"
    rows = [
        ("what", "chosen", "from", "rule"),
        ("spacing", width(configuration["spacing"]), "spacings of all cases", "nnU-Net's"),
        (
            "patch_size",
            width(configuration["patch_size"]),
            f"median shape {median}",
            f"nnU-Net's; both training steps within {budget}",
        ),
        ("batch_size", str(batch), f"{count} cases", f"the same ({stock})"),
        (
            "nnU-Net's width",
            width(topology["features_per_stage"]),
            budget,
            "nnU-Net's; halved if a step takes too long",
        ),
        (
            "data_identifier",
            str(configuration["data_identifier"]),
            "spacing, intensities",
            "nnU-Net's data if they are the same",
        ),
        (
            "features_per_stage",
            width(settings.features_per_stage),
            budget,
            "the widest of 4/32 to 32/32 of nnU-Net's that fits",
        ),
        *([tokens] if settings.is_hidiff else pgdiffseg),
        ("timesteps, schedule", f"{settings.timesteps}, {settings.schedule}", "-", "the paper's"),
        ("prediction_type", settings.prediction_type, "-", best),
        ("start_step, steps, samples", f"{settings.start_step}, {settings.steps}, {settings.samples}", "-", best),
        ("presegmentation_weight", f"{settings.presegmentation_weight:g}", "-", best),
        ("learning_rate", f"{settings.learning_rate:g}", "-", best),
        ("ema_decay", f"{settings.ema_decay:g}", f"{EPOCHS} epochs", "last ninth of the steps, at most 10 000"),
        ("memory of nnU-Net", f"{record.nnunet_gb:.2f} GB", f"float32: {record.nnunet_fp32_gb:.2f} GB", COUNTED),
        (
            "memory of the denoiser",
            f"{record.denoiser_gb:.2f} GB",
            f"float32: {record.denoiser_fp32_gb:.2f} GB",
            COUNTED,
        ),
    ]
    return _table(rows)


def _alternatives(planner: DiffusionPlanning, configuration: dict[str, Any], name: str, device: torch.device) -> str:
    found, features = planner.sized[name], tuple(topology_of(configuration)["features_per_stage"])
    size = (found.channels, planner.heads, int(configuration["batch_size"]))
    budget, gpu = TimeBudget(1.0, device), planner.budget.gpu
    stock, stock_fp32 = (nnunet_cost(configuration, *size, amp=amp, gpu=gpu) for amp in (True, False))

    def row(network: str, widths: Sequence[int], half: Cost, full: Cost, rate: float) -> tuple[str, ...]:
        figures = (f"{half.total / GB:.2f}", f"{full.total / GB:.2f}", flops_text(half.flops))
        return (network, _numbers(widths), *figures, f"{half.flops / stock.flops:.2f}", _hours(half.flops / rate))

    head = ("network", "width", "GB, half precision", "GB, float32", "FLOPs a step", "ratio", f"hours, {EPOCHS} epochs")
    rows = [head, row("nnU-Net", features, stock, stock_fp32, budget.nnunet_rate(configuration, *size[:2]))]
    rate = budget.denoiser_rate(configuration, found.settings, *size[:2])
    for parts in sorted({*ALTERNATIVES, found.parts}):
        settings = dataclasses.replace(found.settings, features_per_stage=width_at(parts, features))
        half, full = (denoiser_cost(configuration, settings, *size, amp=amp, gpu=gpu) for amp in (True, False))
        mark = " (chosen)" if parts == found.parts else ""
        rows.append(row(f"denoiser {parts}/32{mark}", settings.features_per_stage, half, full, rate))
    where = "GPU" if device.type == "cuda" else "CPU"
    busy = f" The machine was busy meanwhile ({sign}): the hours are uncertain." if (sign := budget.busy()) else ""
    return (
        f"{_table(rows)}\n\nHours on this machine's {where}, estimated from a few training steps on small patches, without "
        f"loading and augmentation; for other widths scaled by FLOPs.{busy}"
    )


def _hours(step_seconds: float) -> str:
    hours = step_seconds * STEPS_PER_EPOCH * EPOCHS / 3600
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{float(value):.4g}" for value in values)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
