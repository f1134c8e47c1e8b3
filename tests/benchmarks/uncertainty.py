r"""Is the uncertainty of a diffusion model worth more than nnU-Net's own softmax and the disagreement of five nnU-Nets?

For one fold of a working folder of compare.py, whose models are trained: predicts the fold's validation cases by the commands
a user has, evaluates each prediction by `nnunet_diffusion evaluate`, and writes WORKDIR/uncertainty/NAME/table.md. With
`--inner` five nnU-Nets are trained first, on five folds of the training cases, so that the validation cases are new to all of
them. What is finished is kept.

    python tests/benchmarks/uncertainty.py --workdir W --dataset Dataset004_Hippocampus --name 3d --configuration 3d_fullres \
        --plans-name narrow --nnunet nnUNetTrainer_5epochs --inner nnUNetTrainer_5epochs \
        --run 'five: DiffusionTrainerUNet_5epochs__narrow_unet --samples 5' \
        --run 'mixed: DiffusionTrainerUNet_5epochs__narrow_unet --samples 6 --start_step 100 300 600'
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison_plans import Folders, enter_workdir
from comparison_training import Deadline, Training, train, write_missing_trainer

from nnunet_diffusion.evaluation.comparison import markdown_table, number
from nnunet_diffusion.evaluation.metrics import evenly_spaced

INNER_FOLDS = 5
FOLDS, PLAIN = "folds", "nnunet"
DONE = "finished"


def main() -> None:
    """Train what is missing, predict, evaluate and write the table."""
    options = read_options()
    folders = enter_workdir(options.workdir, options.dataset)
    out = folders.work / "uncertainty" / options.name
    cases = gather(folders, out, options.cases, options.rater)
    predictions = [PLAIN]
    plain = [options.nnunet, options.plans_name, options.configuration]
    predict_nnunet(out, PLAIN, plain, [0], options)
    if options.inner:
        predictions.append(FOLDS)
        disagree(folders, out, [options.inner, *plain[1:]], options)
    for name, (model_name, *words) in options.runs.items():
        predictions.append(name)
        model = folders.results / f"{model_name}__{options.configuration}"
        predict(out, name, ["-m", str(model), "-f", "0", *words], options)
    summaries = {name: evaluate(out, name, options) for name in predictions}
    text = f"{len(cases)} cases\n\n{table(summaries)}\n{differences(out, predictions)}"
    (out / "table.md").write_text(text)
    print(text)


def read_options() -> argparse.Namespace:
    """Read the command line; `runs` is name -> model and arguments of `nnunet_diffusion predict`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--workdir", type=Path, required=True)
    add("--dataset", required=True, help="name of the dataset in the working folder")
    add("--name", required=True, help="name of the output folder")
    add("--configuration", default="2d")
    add("--plans-name", required=True, help="of nnU-Net's training")
    add("--nnunet", required=True, help="trainer of nnU-Net")
    add("--inner", metavar="TRAINER", help="trainer of five nnU-Nets on folds of the training cases")
    add("--run", action="append", default=[], metavar="NAME: TRAINER__PLANS ARGUMENTS", help="a model's prediction")
    add("--rater", action="append", default=[], help="folder of a further rater's labels in the dataset")
    add("--cases", type=int, help="number of validation cases")
    add("--no-mirroring", action="store_true")
    add("--device", default="cpu")
    options = parser.parse_args()
    pairs = [run.partition(":") for run in options.run]
    options.runs = {name.strip(): words.split() for name, _, words in pairs}
    return options


def gather(folders: Folders, out: Path, count: int | None, raters: Sequence[str]) -> list[str]:
    """Link images and labels of fold 0's validation cases into folders of their own; return their names."""
    split = json.loads((folders.preprocessed / "splits_final.json").read_text())[0]
    cases = evenly_spaced(sorted(split["val"]), count)
    for kind in ("images", "labels", *raters):
        source = folders.raw / {"images": "imagesTr", "labels": "labelsTr"}.get(kind, kind)
        target = out / {"images": "imagesTs", "labels": "labelsTs"}.get(kind, kind)
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            of_case = any(
                path.name.startswith(f"{case}.") or path.name[:-1].startswith(f"{case}_000") for case in cases
            )
            if of_case and not (target / path.name).exists():
                (target / path.name).symlink_to(path.resolve())
    dataset = out / "dataset.json"
    if not dataset.exists():
        dataset.symlink_to((folders.raw / "dataset.json").resolve())
    return cases


def run(words: Sequence[str], log: Path) -> None:
    """Run a command, its output in a file."""
    with log.open("a") as file:
        print(" ".join(words), file=file, flush=True)
        subprocess.run(words, check=True, stdout=file, stderr=subprocess.STDOUT)


def once(out: Path, name: str, words: Sequence[str]) -> None:
    """Run a command that fills the folder of a name, unless it did so before."""
    done = out / f"{name}.{DONE}"
    if not done.exists():
        run(words, out / f"{name}.log")
        done.touch()


def predict(out: Path, name: str, words: Sequence[str], options: argparse.Namespace) -> None:
    """Predict with the diffusion model, as a user does."""
    rest = ["--uncertainty", "--save_probabilities", "--continue_prediction", "-device", options.device]
    if options.rater:
        rest.append("--keep_samples")
    if options.no_mirroring:
        rest.append("--disable_tta")
    inputs = ["-i", str(out / "imagesTs"), "-o", str(out / name)]
    once(out, name, ["nnunet_diffusion", "predict", *inputs, *words, *rest, "--disable_progress_bar"])


def predict_nnunet(
    out: Path, name: str, plain: Sequence[str], folds: Sequence[int], options: argparse.Namespace
) -> None:
    """Predict with stock nnU-Net, one or several of its folds."""
    trainer, plans, configuration = plain
    words = ["-i", str(out / "imagesTs"), "-o", str(out / name), "-d", options.dataset, "-c", configuration]
    words += ["-tr", trainer, "-p", plans, "-f", *map(str, folds), "-device", options.device, "--save_probabilities"]
    words += ["-npp", "1", "-nps", "1", "--disable_progress_bar"]
    if options.no_mirroring:
        words.append("--disable_tta")
    once(out, name, ["nnUNetv2_predict", *words])


def disagree(folders: Folders, out: Path, plain: Sequence[str], options: argparse.Namespace) -> None:
    """Train five nnU-Nets on folds of the training cases, predict with each, and put them together."""
    trainer, plans, configuration = plain
    write_missing_trainer(folders, trainer)
    members = []
    for fold in inner_folds(folders):
        train(folders, Training(trainer, plans, configuration, fold, options.device), Deadline())
        members.append(f"inner_{fold}")
        predict_nnunet(out, members[-1], plain, [fold], options)
    inputs = [str(out / member) for member in members]
    once(out, FOLDS, ["nnunet_diffusion", "ensemble", "-i", *inputs, "-o", str(out / FOLDS), "--save_probabilities"])


def inner_folds(folders: Folders) -> list[int]:
    """Return the numbers of five folds of fold 0's training cases in splits_final.json, added where they are missing."""
    path = folders.preprocessed / "splits_final.json"
    splits = json.loads(path.read_text())
    cases = sorted(splits[0]["train"])
    parts = [cases[place::INNER_FOLDS] for place in range(INNER_FOLDS)]
    inner = [{"train": sorted(set(cases) - set(part)), "val": part} for part in parts]
    if splits[-INNER_FOLDS:] != inner:
        splits += inner
        path.write_text(json.dumps(splits, indent=2))
    return list(range(len(splits) - INNER_FOLDS, len(splits)))


def evaluate(out: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the summary of a prediction's evaluation."""
    truths = [word for folder in ("labelsTs", *options.rater) for word in ("-g", str(out / folder))]
    once(out, f"{name}_evaluation", ["nnunet_diffusion", "evaluate", "-p", str(out / name), *truths, "-np", "0"])
    return json.loads((out / name / "evaluation" / "evaluation.json").read_text())["predictions"][name]


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all headline numbers, one row per prediction."""
    rows = []
    for name, each in summaries.items():
        errors, failures = each.get("errors", {}), each.get("failure_detection", {})
        calibration = each["calibration"]
        entropy = errors.get("entropy of the probabilities", {}).get("mean", float("nan"))
        epistemic = errors.get("epistemic", {}).get("mean", float("nan"))
        row = [name, number(each["dice"]["mean"]), number(calibration["pooled_ece"])]
        row += [number(calibration.get("pooled_ece_tempered", float("nan"))), number(entropy), number(epistemic)]
        row += [
            number(failures.get(key, {}).get("normalised", float("nan")), 2) for key in ("confidence", "pairwise Dice")
        ]
        row += [_coverage(each.get(key, {})) for key in ("volumes", "volumes_of_level_sets")]
        for of_class in list(each.get("raters", {}).values())[:1]:
            row += [number(of_class[key]["mean"]) for key in ("ged", "hungarian_iou", "consensus_dice")]
        rows.append(row)
    header = ["prediction", "Dice", "ECE", "tempered", "AUROC of the entropy", "of the epistemic part"]
    header += [
        "AURC of `confidence`",
        "of `pairwise Dice`",
        "volumes in the samples' interval",
        "in that of level sets",
    ]
    header += ["GED", "matched IoU", "consensus Dice"] if len(rows[0]) > len(header) else []
    return markdown_table(header, rows)


def _coverage(volumes: Mapping[str, Mapping[str, Any]]) -> str:
    """Write coverage and width (as a share of the mean volume) of each class."""
    found = [
        f"{each['coverage']:.2f} (width {each['mean_width_mm3'] / each['mean_true_mm3']:.2f})"
        for each in volumes.values()
    ]
    return ", ".join(found) or "-"


def differences(out: Path, predictions: Sequence[str]) -> str:
    """Return paired differences to nnU-Net's own prediction, and to the five nnU-Nets where they are."""
    # both import nnU-Net, which reads its folders' variables then
    from nnunet_diffusion.evaluation.evaluate import read_numbers
    from nnunet_diffusion.evaluation.summary import compare

    numbers = {
        name: {path.stem: read_numbers(path) for path in (out / name / "evaluation" / "cases").glob("*.json")}
        for name in predictions
    }
    rows = []
    for baseline in [name for name in (PLAIN, FOLDS) if name in predictions]:
        for name in predictions:
            if name == baseline:
                continue
            found = compare(numbers[name], numbers[baseline])
            for metric in ("dice", "ece in the band", "auroc of entropy of the probabilities"):
                each = found[metric]
                low, high = each["interval"]
                rows.append([name, baseline, metric, f"{each['mean_difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"])
    return markdown_table(["prediction", "against", "metric", "mean difference", "95 % interval"], rows)


if __name__ == "__main__":
    os.environ.setdefault("nnUNet_compile", "f")
    sys.exit(main())
