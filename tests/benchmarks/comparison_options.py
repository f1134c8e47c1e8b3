"""What the comparison's command line asks for: plans, variants of the denoiser, and the settings each is measured at."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison_plans import STOCK_PLANS

DEFAULT_SEED = 1234
LENGTHS = {1: "_1epoch", 5: "_5epochs", 10: "_10epochs", 20: "_20epochs", 50: "_50epochs"}
LENGTHS |= {100: "_100epochs", 250: "_250epochs", 1000: ""}


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compare nnU-Net with diffusion models that start from it.")
    add = parser.add_argument
    add("--dataset", type=Path, required=True, help="raw dataset folder, DatasetXXX_NAME")
    add("--workdir", type=Path, required=True, help="takes the three nnU-Net folders and the results")
    add("--configuration", default="2d", choices=["2d", "3d_fullres", "3d_lowres"])
    add("--fold", type=int, default=0)
    add("--epochs", type=int, default=10, choices=LENGTHS, help="of nnU-Net and of each denoiser")
    add("--denoiser-epochs", type=int, choices=LENGTHS, help="where it is not nnU-Net's length")
    add(
        "--trainers",
        nargs=2,
        metavar=("NNUNET", "DIFFUSION"),
        help="trainer classes instead of those of --epochs; a denoiser may have been trained beside another nnU-Net",
    )
    add(
        "--plans-name",
        default=None,
        help="of the plans made by --patch, --batch, --features (default small), or of planned ones without these",
    )
    add(
        "--patch",
        type=int,
        nargs="+",
        help="patch size; without this, --batch, --features, --spacing and --plans-name: stock nnUNetPlans",
    )
    add("--batch", type=int)
    add("--spacing", type=float, nargs="+", help="target spacing of the axes (-overwrite_target_spacing of nnU-Net)")
    add("--features", type=int, nargs="+", help="nnU-Net's width at each stage")
    add("--prediction-types", nargs="*", default=["logits"], help="one denoiser each")
    add("--variant", action="append", default=[], metavar="NAME:JSON", help='a further denoiser, w:{"sdb_depth": 3}')
    add("--start-steps", type=int, nargs="*", default=[100, 300, 500])
    add("--steps", type=int, nargs="*", default=[1, 2, 5, 10])
    add("--samples", type=int, nargs="*", default=[1, 5])
    add("--noise-steps", type=int, nargs="*", default=[10, 50], help="steps from pure noise; all of them: ancestral")
    add(
        "--presegmentation-weights",
        type=float,
        nargs="*",
        default=[],
        help="above 0, beside 0: for each start_step, with the fewest steps",
    )
    add("--no-repair", action="store_true", help="leave the repair test out")
    add(
        "--controls",
        nargs="*",
        default=[],
        choices=["longer", "stock"],
        help="longer: nnU-Net for its own and the denoiser's time, with its last weights and with averaged ones (one "
        "training); stock: nnU-Net on stock plans",
    )
    add("--control-epochs", type=int, help="length of the longer control (default: measured from the first denoiser)")
    add("--cases", type=int, help="evaluate this many validation cases, evenly spaced")
    add("--vessels", action="store_true", help="measure clDice and the recall of thin vessels too")
    add("--no-mirroring", action="store_true")
    add("--tile-batch", type=int, default=16)
    add("--device", default="cuda", choices=["cuda", "cpu", "mps"])
    add("--seed", type=int, default=DEFAULT_SEED, help="of the reverse processes, the bootstrap and the corruptions")
    add("--processes", type=int, default=os.cpu_count() or 1, help="of the preprocessing")
    add("--time-limit", type=float, default=math.inf, help="seconds after which to stop cleanly")
    add("--train-only", action="store_true")
    options = parser.parse_args(words)
    changed = bool(options.patch or options.batch or options.features or options.spacing)
    options.plans_name = options.plans_name or ("small" if changed else STOCK_PLANS)
    options.stock = options.plans_name == STOCK_PLANS
    options.planned = not (changed or options.stock)
    if options.stock and changed:
        parser.error(f"--plans-name {STOCK_PLANS} and --patch, --batch, --features or --spacing exclude each other")
    return options


def diffusion_sections(options: argparse.Namespace, planned: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return variant name -> `diffusion` section of its plans; what it does not say stays as planned.

    Raises:
        ValueError: a variant is not NAME:JSON or its name is taken.
    """
    sections = {kind: {**planned, "prediction_type": kind} for kind in options.prediction_types}
    for variant in options.variant:
        name, _, text = variant.partition(":")
        if not name.isidentifier() or not text or name in sections:
            raise ValueError(f"--variant {variant!r} must be NAME:JSON with a new name of letters, digits and _")
        sections[name] = {**planned, **json.loads(text)}
    return sections


def sampling_settings(options: argparse.Namespace, defaults: Any) -> list[Any]:
    """Return the settings to measure, the model's default first, each distinct result once.

    Args:
        options: of the command line.
        defaults: the trained model's DiffusionSettings.
    """
    from comparison_evaluation import CORRUPTIONS, NNUNET, Setting

    seed = {"seed": options.seed}
    found = {"default": Setting("default: " + _describe(defaults, {}), NNUNET, seed)}
    for start_step in (step for step in options.start_steps if step <= defaults.max_train_step):
        for weight in [0.0, *options.presegmentation_weights]:
            for steps in [min(options.steps)] if weight else options.steps:
                for samples in options.samples:
                    changes = {"start_step": start_step, "steps": steps, "samples": samples}
                    _add(found, defaults, changes | {"presegmentation_weight": weight}, seed)
    from_noise = defaults.max_train_step == defaults.timesteps and not defaults.is_hidiff
    for steps in options.noise_steps if from_noise else []:
        changes = {"from_noise": True, "start_step": defaults.timesteps, "steps": steps, "samples": 1}
        name = f"from noise, {defaults.sampler}, {steps} steps"
        if steps == defaults.timesteps:
            name, changes["sampler"] = f"from noise, ancestral DDPM, {steps} steps", "ddpm"
        found[name] = Setting(name, "noise", changes | {"presegmentation_weight": 0.0} | seed)
    settings = list(found.values())
    if not options.no_repair:
        # a given start is not mixed into the result, so that the weight makes no difference
        one = [s for s in settings if s.start == NNUNET and s.changes.get("samples", 1) == 1]
        fewest = {
            s.changes.get("start_step", defaults.start_step): s
            for s in reversed(one)
            if s.changes.get("presegmentation_weight", defaults.presegmentation_weight) == 0
        }
        for setting in fewest.values():
            settings += [Setting(setting.name, corruption, setting.changes) for corruption in CORRUPTIONS]
    return settings


def _add(found: dict[str, Any], defaults: Any, changes: dict[str, Any], seed: dict[str, int]) -> None:
    from comparison_evaluation import NNUNET, Setting

    if changes["steps"] <= changes["start_step"] and any(getattr(defaults, key) != changes[key] for key in changes):
        name = _describe(defaults, changes)
        found[name] = Setting(name, NNUNET, changes | seed)


def _describe(defaults: Any, changes: dict[str, Any]) -> str:
    value = {key: changes.get(key, getattr(defaults, key)) for key in ("start_step", "steps", "samples")}
    weight = changes.get("presegmentation_weight", defaults.presegmentation_weight)
    plural = ["s" if value[key] > 1 else "" for key in ("steps", "samples")]
    text = f"T'={value['start_step']}, {value['steps']} step{plural[0]}, {value['samples']} sample{plural[1]}"
    return text + (f", nnU-Net weight {weight:g}" if weight else "")
