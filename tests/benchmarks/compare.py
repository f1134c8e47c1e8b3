r"""Compare nnU-Net with diffusion models that start from it, on one fold of an nnU-Net raw dataset.

Plans and preprocesses by stock nnU-Net, trains nnU-Net and one denoiser per variant at equal length, predicts the
validation cases at many settings, and writes rows.csv and report.md into WORKDIR/comparison/DATASET/. All that is
finished is kept: the same command goes on where a time limit (exit code 75) or an interruption stopped it.

    python tests/benchmarks/compare.py --dataset DATA/Dataset004_Hippocampus --workdir W --configuration 2d \
        --epochs 10 --plans-name small --patch 56 40 --batch 32 --features 8 16 32 64 --prediction-types logits x0

Plans that are there already, of `nnunet_diffusion plan --preprocess` with nnU-Net's folders in WORKDIR, are taken as they
are by --plans-name alone, and variants change their settings: `--plans-name P --prediction-types --variant 'own:{}'`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from comparison_options import DEFAULT_SEED, LENGTHS, diffusion_sections, read_options, sampling_settings
from comparison_plans import (
    REPOSITORY,
    STOCK_PLANS,
    Folders,
    diffusion_plans,
    plan_and_preprocess,
    planned_before,
    read_plans,
    set_up_folders,
    smaller_plans,
    write_plans,
)
from comparison_training import (
    Deadline,
    TimeIsUp,
    Training,
    control_epochs,
    epoch_seconds,
    share_presegmentor,
    train,
    without_averaging,
    write_missing_trainer,
)

from nnunet_diffusion.evaluation.metrics import evenly_spaced
from nnunet_diffusion.model.settings import values_of


def make_plans(folders: Folders, options: argparse.Namespace) -> dict[str, Any]:
    """Plan and preprocess what is missing; return nnU-Net's plans, smaller ones, or those that were planned before.

    Raises:
        FileNotFoundError: there are no plans of the name given, or their data are not preprocessed.
    """
    if "stock" in options.controls:
        plan_and_preprocess(folders, options.configuration, options.processes)
    if options.planned:
        return planned_before(folders, options.plans_name, options.configuration)
    name = plan_and_preprocess(folders, options.configuration, options.processes, options.spacing)
    if options.stock:
        return read_plans(folders, name)
    changes = (options.plans_name, options.configuration, options.patch, options.batch, options.features)
    plans = smaller_plans(read_plans(folders, name), *changes)
    write_plans(folders, plans)
    return plans


def train_all(folders: Folders, options: argparse.Namespace, deadline: Deadline) -> dict[str, Training]:
    """Train what is missing; return the models by name, nnU-Net first."""
    plans = make_plans(folders, options)
    planned = values_of(plans["configurations"][options.configuration].get("diffusion", {}))
    suffixes = LENGTHS[options.epochs], LENGTHS[options.denoiser_epochs or options.epochs]
    names = options.trainers or (f"nnUNetTrainer{suffixes[0]}", f"DiffusionTrainer{suffixes[1]}")
    nnunet, diffusion = (write_missing_trainer(folders, name) for name in names)
    rest = (options.configuration, options.fold, options.device)
    models = {"nnU-Net": Training(nnunet, options.plans_name, *rest)}
    train(folders, models["nnU-Net"], deadline, validate=True)
    for variant, section in diffusion_sections(options, planned).items():
        if suffixes[0] != suffixes[1] and not section.get("presegmentor_trainer"):
            section["presegmentor_trainer"] = nnunet
        variant_plans = diffusion_plans(plans, options.configuration, variant, section)
        write_plans(folders, variant_plans)
        models[variant] = Training(diffusion, variant_plans["plans_name"], *rest)
        share_presegmentor(folders, models["nnU-Net"], variant_plans["plans_name"])
        train(folders, models[variant], deadline)
    for control in options.controls:
        models |= _control(folders, options, control, models, deadline)
    return models


def _control(
    folders: Folders, options: argparse.Namespace, control: str, models: dict[str, Training], deadline: Deadline
) -> dict[str, Training]:
    """Train a control; return the models it gives by name."""
    rest = (options.configuration, options.fold, options.device)
    nnunet = models["nnU-Net"]
    if control == "stock":
        training = Training(nnunet.trainer, STOCK_PLANS, *rest)
        train(folders, training, deadline)
        return {"nnU-Net on stock nnUNetPlans": training}
    kept = output_folder(folders, options) / "control_epochs.json"
    if options.control_epochs is None and not kept.is_file():
        denoiser = next(training for name, training in models.items() if name != "nnU-Net")
        epochs = control_epochs(epoch_seconds(folders, nnunet), epoch_seconds(folders, denoiser))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(epochs))
    epochs = options.control_epochs or json.loads(kept.read_text())
    # one training gives both: the average of the weights does not change what is averaged
    plain, averaged = (
        Training(write_missing_trainer(folders, f"{base}_{epochs}epochs"), options.plans_name, *rest)
        for base in ("nnUNetTrainer", "nnUNetTrainerEMA")
    )
    train(folders, averaged, deadline)
    without_averaging(folders, averaged, plain)
    return {f"nnU-Net, {epochs} epochs": plain, f"nnU-Net, {epochs} epochs, averaged weights": averaged}


def output_folder(folders: Folders, options: argparse.Namespace) -> Path:
    """Return this comparison's folder; models and settings may be added to it later."""
    length = "_".join(options.trainers) if options.trainers else f"{options.epochs}epochs"
    if options.denoiser_epochs and options.denoiser_epochs != options.epochs:
        length += f"_{options.denoiser_epochs}epochs"
    mirrored = "_unmirrored" if options.no_mirroring else ""
    seed = "" if options.seed == DEFAULT_SEED else f"_seed{options.seed}"
    vessels = "_vessels" if options.vessels else ""  # rows that have their metrics
    name = f"{options.plans_name}_{options.configuration}_{length}_fold{options.fold}{mirrored}{seed}{vessels}"
    return folders.work / "comparison" / folders.dataset / name


def evaluate_all(
    folders: Folders, options: argparse.Namespace, models: dict[str, Training], deadline: Deadline
) -> None:
    """Measure every model, then write the report; it is written too, from what there is, when time is up."""
    from comparison_evaluation import NNUNET, Model, RowFile, Setting, evaluate, start_from
    from comparison_report import write_report

    output = output_folder(folders, options)
    (output / NNUNET).mkdir(parents=True, exist_ok=True)
    description = json.loads((folders.raw / "dataset.json").read_text())
    cases = validation_cases(models["nnU-Net"].folder(folders), description["file_ending"], options.cases)
    rows = RowFile(output / "rows.csv", len(description["labels"]) - 1)
    try:
        for name, training in models.items():
            model = Model(
                name,
                training.folder(folders).parent,
                options.fold,
                options.device,
                mirror=not options.no_mirroring,
                tile_batch=options.tile_batch,
            )
            settings = [Setting("", NNUNET, {})]
            if hasattr(model.segmenter, "settings"):
                start_from(model, models["nnU-Net"].folder(folders))
                settings = sampling_settings(options, model.segmenter.settings)
            where = cases, folders.raw, output / NNUNET, rows, deadline.check, options.seed
            evaluate(model, settings, *where, vessels=options.vessels)
    finally:
        if rows.rows:
            (output / "report.md").write_text(write_report(rows.rows, _heading(folders, options, models), options.seed))
            print(f"Report: {output / 'report.md'}")


def validation_cases(nnunet: Path, file_ending: str, number: int | None) -> list[str]:
    """Return the cases of nnU-Net's own validation, or `number` of them, evenly spaced in their sorted list.

    A fold that splits_final.json does not have is a random split of nnU-Net's own.
    """
    summary = json.loads((nnunet / "validation" / "summary.json").read_text())
    cases = sorted(Path(case["reference_file"]).name.removesuffix(file_ending) for case in summary["metric_per_case"])
    return evenly_spaced(cases, number)


def _heading(folders: Folders, options: argparse.Namespace, models: dict[str, Training]) -> str:
    section = read_plans(folders, options.plans_name)["configurations"][options.configuration]
    widths = section["architecture"]["arch_kwargs"]["features_per_stage"]
    lines = [
        f"# {folders.dataset}, {options.configuration}, fold {options.fold}\n",
        f"Plans {options.plans_name}: patch {section['patch_size']}, batch {section['batch_size']}, nnU-Net's widths "
        f"{widths}. Mirroring {'off' if options.no_mirroring else 'on'}, device {options.device}, up to "
        f"{options.tile_batch} tiles in a batch, seed {options.seed}. Differences are model minus nnU-Net on the same "
        "cases; only cases that have the class. Samplers are those of the models' settings, from noise too.\n",
    ]
    for name, training in models.items():
        if (training.folder(folders) / "checkpoint_final.pth").is_file():
            seconds = epoch_seconds(folders, training)
            typical = float(np.median(seconds))
            lines.append(f"* {name}: {training.trainer}, {len(seconds)} epochs of {typical:.1f} s (median)")
    return "\n".join([*lines, ""])


def main() -> int:
    """Run the whole comparison."""
    options = read_options()
    deadline = Deadline(time.time() + options.time_limit)
    folders = set_up_folders(options.dataset, options.workdir)
    sys.path.insert(0, str(REPOSITORY))
    try:
        models = train_all(folders, options, deadline)
        if not options.train_only:
            evaluate_all(folders, options, models, deadline)
    except TimeIsUp:
        print("Time is up; the same command goes on from here.")
        return os.EX_TEMPFAIL
    return 0


if __name__ == "__main__":
    sys.exit(main())
