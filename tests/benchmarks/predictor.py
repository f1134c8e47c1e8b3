r"""Measure DiffusionPredictor on validation cases: samples, fusion, joint and tile-wise steps, foreign pre-segmentations.

    python tests/benchmarks/predictor.py --workdir W --dataset DATA/Dataset004_Hippocampus --out W/predictor/hippocampus \
        --model DiffusionTrainer_10epochs__batch16_x0__2d --nnunet nnUNetTrainer_50epochs__batch16__2d \
        --weak nnUNetTrainer_10epochs__batch16__2d --cases 20 --device cpu

Prints tables of Dice and HD95, paired with nnU-Net (mirrored), and of seconds, evaluations and FLOPs per case. Rows are
kept in OUT/rows.csv; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison_evaluation import NNUNET, Case, Model, Row, RowFile, measured_rows
from comparison_plans import set_up_folders
from comparison_report import dice_table, hd95_table, mean_rows
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_diffusion.evaluation.comparison import markdown_table
from nnunet_diffusion.evaluation.metrics import evenly_spaced
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.presegmentation import Presegmentation
from nnunet_diffusion.inference.volume import Evaluations
from nnunet_diffusion.planning.flops import count_flops
from nnunet_diffusion.training.checkpoints import read_checkpoint

WEAK = "weak nnU-Net"


@dataclass(frozen=True)
class Way:
    """One way to predict; `changes` are settings, `start` a pre-segmentation from outside."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    mirror: bool = True
    joint: bool = True
    fusion: str = "mean"
    start: str = ""
    stock: bool = False


def ways(weak: bool) -> list[Way]:
    """All ways, nnU-Net mirrored first: it is the baseline."""
    only_nnunet, no_nnunet = {"presegmentation_weight": 1.0}, {"presegmentation_weight": 0.0}
    far = {"start_step": 300, **no_nnunet}
    found = [
        Way(NNUNET, only_nnunet),
        Way("nnU-Net, not mirrored", only_nnunet, mirror=False),
        Way("stock prediction, default", stock=True),
        Way("default"),
        Way("default, nnU-Net not mirrored", mirror=False),
        *[Way(f"default, {number} samples", {"samples": number}) for number in (5, 10)],
        Way("without nnU-Net's weight, 1 sample", no_nnunet),
        *[Way(f"T'=300, without weight, 5 samples, {kind}", {"samples": 5, **far}, fusion=kind)
          for kind in ("mean", "majority", "staple")],
        *[Way(f"T'=300, without weight, 5 steps, {name}", {"steps": 5, **far}, joint=joint)
          for name, joint in (("joint", True), ("tile by tile", False))],
    ]  # fmt: skip
    if weak:
        found += [
            Way(f"{WEAK}, mirrored", only_nnunet, start="probabilities"),
            Way(f"from {WEAK}'s probabilities, default", start="probabilities"),
            *[Way(f"from {WEAK}'s label map, T'={start}", {"start_step": start, "steps": 1}, start="labels")
              for start in (100, 300, 500)],
        ]  # fmt: skip
    return found


class Bench:
    """A diffusion model with the given nnU-Net inside, and the weak one beside it."""

    def __init__(self, model: Path, nnunet: Path, weak: Path | None, fold: int, device: str) -> None:
        self.predictor = DiffusionPredictor(device=torch.device(device), allow_tqdm=False)
        self.predictor.initialize_from_trained_model_folder(str(model), (fold,))
        weights = read_checkpoint(nnunet / f"fold_{fold}" / "checkpoint_final.pth")["network_weights"]
        # a denoiser that never meets its pre-segmentor in training works with any of that architecture
        assert "presegmentation" not in self.predictor.network.settings.starts
        self.predictor.list_of_parameters[0].update({f"presegmentor.{key}": value for key, value in weights.items()})
        self.predictor.network.load_state_dict(self.predictor.list_of_parameters[0])
        self.weak = None if weak is None else read_checkpoint(weak / f"fold_{fold}" / "checkpoint_final.pth")
        self.flops = self._count_flops()
        self.known: dict[str, np.ndarray] = {}

    def _count_flops(self) -> dict[str, float]:
        network, configuration = self.predictor.network, self.predictor.configuration_manager
        image = torch.zeros(1, len(self.predictor.dataset_json["channel_names"]), *configuration.patch_size)
        image, counted = image.to(self.predictor.device), {}
        network.to(self.predictor.device)
        state = torch.zeros(1, network.denoiser.state_channels, *image.shape[2:], device=image.device)
        with torch.no_grad():
            condition = network.encode(image, 0)
            parts = {
                "presegmentor": lambda: network.presegmentor(image),
                "condition": lambda: network.encode(image, 0),
                "denoiser": lambda: network.denoiser(state, torch.zeros(1, device=image.device), condition),
            }
            for name, evaluate in parts.items():
                counted[name] = float(count_flops(evaluate))
        return counted

    def presegment(self, data: torch.Tensor, way: Way) -> Presegmentation | None:
        """The weak network's output, on the network's grid."""
        if not way.start:
            return None
        assert self.weak is not None
        with self._all_weight_on(self.weak["network_weights"]):
            logits = self.predictor.predict_volume(data).logits
        probabilities = logits.softmax(0).numpy()
        if way.start == "labels":
            hot = np.arange(len(probabilities)).reshape(-1, *[1] * (probabilities.ndim - 1)) == probabilities.argmax(0)
            return Presegmentation(hot.astype(np.float32), True, WEAK)
        return Presegmentation(probabilities, False, WEAK)

    @contextlib.contextmanager
    def _all_weight_on(self, weights: dict[str, torch.Tensor]) -> Iterator[None]:
        kept = self.predictor.list_of_parameters[0]
        changed = {**kept, **{f"presegmentor.{key}": value for key, value in weights.items()}}
        self.predictor.list_of_parameters = [changed]
        self.predictor.use_mirroring = True
        with self.predictor.network.overridden(presegmentation_weight=1.0, samples=1):
            try:
                yield
            finally:
                self.predictor.list_of_parameters = [kept]

    def predict(self, case: Case, way: Way) -> tuple[torch.Tensor, float, Evaluations]:
        """Return logits whose decision is the segmentation, seconds, and evaluations."""
        predictor, given = self.predictor, self.presegment(case.data, way)
        predictor.use_mirroring, predictor.joint, predictor.fusion = way.mirror, way.joint, way.fusion
        with predictor.network.overridden(**way.changes):
            begin = time.perf_counter()
            if way.stock:
                before = predictor.network.evaluations
                logits = nnUNetPredictor.predict_logits_from_preprocessed_data(predictor, case.data).float()
                seen = predictor.network.evaluations - before
                return logits, time.perf_counter() - begin, Evaluations(seen, seen, seen)
            found = predictor.predict_volume(case.data, given)
        logits = found.logits if found.decision is None else found.decision
        return logits, time.perf_counter() - begin, found.evaluations

    def rows(self, case: Case, way: Way, classes: dict[int, str]) -> tuple[list[Row], dict[str, Any]]:
        """Measure one case; also return its cost."""
        logits, seconds, evaluations = self.predict(case, way)
        predictor = self.predictor
        result = np.asarray(
            convert_predicted_logits_to_segmentation_with_correct_shape(
                logits.numpy(), *(predictor.plans_manager, predictor.configuration_manager, predictor.label_manager),
                case.properties,
            ), dtype=np.int16,
        )  # fmt: skip
        if way.name == NNUNET:
            self.known[case.name] = result
        made = vars(evaluations)
        gflop = sum(made[name] * self.flops[name] for name in made) / 1e9
        counts = evaluations.presegmentor, evaluations.denoiser
        rows = measured_rows((way.name, "", ""), case, classes, self.known[case.name], result, seconds, counts)
        voxels = math.prod(case.data.shape[1:])
        return rows, {"way": way.name, "case": case.name, "seconds": seconds, "gflop": gflop, "voxels": voxels, **made}


def cost_table(costs: Sequence[dict[str, Any]]) -> str:
    """Means per case, and FLOPs relative to nnU-Net mirrored."""
    names = list(dict.fromkeys(cost["way"] for cost in costs))

    def mean(name: str, key: str) -> float:
        return float(np.mean([cost[key] for cost in costs if cost["way"] == name]))

    lines = []
    for name in names:
        gflop, seconds = mean(name, "gflop"), mean(name, "seconds")
        lines.append(
            [
                name,
                *[f"{mean(name, key):.1f}" for key in ("presegmentor", "condition", "denoiser")],
                f"{gflop:.1f}",
                f"{gflop / mean(NNUNET, 'gflop'):.2f}",
                f"{gflop * 1e3 / mean(name, 'voxels'):.3f}",
                f"{seconds:.2f}",
                f"{seconds / mean(NNUNET, 'seconds'):.2f}",
            ]
        )
    header = ["way", "nnU-Net evaluations", "condition flow", "denoising flow", "GFLOP", "ratio", "MFLOP a voxel", "seconds",
              "ratio"]  # fmt: skip
    return markdown_table(header, lines)


def refuse_other_section(path: Path, section: dict[str, Any]) -> None:
    """Keep the settings that the folder's rows are made with; raise ValueError where those there are of other ones."""
    if path.is_file() and json.loads(path.read_text()) != section:
        raise ValueError(f"{path.parent} holds results with --section '{path.read_text()}': take another --out")
    path.write_text(json.dumps(section))


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of compare.py")
    parser.add_argument("--dataset", type=Path, required=True, help="raw dataset folder")
    parser.add_argument("--model", required=True, help="name of the diffusion model's folder")
    parser.add_argument("--nnunet", required=True, help="name of the folder of the nnU-Net to start from")
    parser.add_argument("--weak", help="name of the folder of a nnU-Net trained for a shorter time")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--cases", type=int, default=20, help="validation cases, evenly spaced")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=1234, help="of the bootstrap")
    parser.add_argument(
        "--section", type=json.loads, default={}, help="settings of inference as JSON, in the place of the model's own"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    refuse_other_section(options.out / "section.json", options.section)
    folders = set_up_folders(options.dataset, options.workdir)
    weak = folders.results / options.weak if options.weak else None
    bench = Bench(folders.results / options.model, folders.results / options.nnunet, weak, options.fold, options.device)
    reader = Model("reader", folders.results / options.model, options.fold, options.device, mirror=True, tile_batch=1)
    cases = evenly_spaced(
        sorted(json.loads((folders.preprocessed / "splits_final.json").read_text())[options.fold]["val"]), options.cases
    )
    rows, costs = RowFile(options.out / "rows.csv", len(reader.classes)), options.out / "costs.jsonl"
    with bench.predictor.network.overridden(**options.section):
        for name in cases:
            missing = [way for way in ways(weak is not None) if (way.name, "", "", name) not in rows.done]
            if not missing:
                continue
            case = reader.load(name, options.dataset)
            if missing[0].name != NNUNET:  # its label map is what voxels are counted against
                missing.insert(0, ways(False)[0])
            for way in missing:
                found, cost = bench.rows(case, way, reader.classes)
                if found[0].key not in rows.done:
                    with costs.open("a") as file:
                        file.write(json.dumps(cost) + "\n")
                    rows.append(found)
            print(f"[{time.strftime('%H:%M:%S')}] {name}", flush=True)
        print(f"\n{len(cases)} cases, settings {bench.predictor.network.settings}, GFLOP of one patch: {bench.flops}\n")
    if len(reader.classes) > 1:
        print(dice_table(mean_rows(rows.rows), options.seed))
    for label in reader.classes.values():
        own = [row for row in rows.rows if row.label == label]
        print(f"{label}\n\n{dice_table(own, options.seed)}\n{hd95_table(own, options.seed)}")
    print(cost_table([json.loads(line) for line in costs.read_text().splitlines()]))


if __name__ == "__main__":
    main()
