"""`nnunet_diffusion demo`: train, predict and evaluate on generated images with nnU-Net's own commands."""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import PRESEGMENTOR_FOLDER

DATASET_ID = 901
DATASET_NAME = "Dataset901_DemoUltrasound"
PLANS_NAME = "nnUNetDiffusionPlans"
SILENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Recipe:
    """All choices of the demo, small enough for two CPU cores without a GPU.

    Attributes:
        training_images: number of images for training and validation.
        test_images: number of images for the report.
        trainer: name of the diffusion trainer; it trains `presegmentor` first.
        presegmentor: name of nnU-Net's trainer, whose network is the pre-segmentor.
        spacing: spacing to which the images (spacing 1) are resampled, so that a patch covers a whole image even on a CPU.
        step_seconds: seconds per training step to plan for on a CPU.
        memory_target_gb: GPU memory to plan for on a GPU.
        ddpm_steps: number of network evaluations of the DDPM from pure noise.
    """

    training_images: int = 60
    test_images: int = 20
    trainer: str = "DiffusionTrainerUNet_5epochs"
    presegmentor: str = "nnUNetTrainer_5epochs"
    spacing: float = 2.0
    step_seconds: float = 0.2
    memory_target_gb: float = 4
    ddpm_steps: int = 10


@dataclass(frozen=True)
class Workplace:
    """Folders of the demo, including nnU-Net's three, with its device and recipe.

    Attributes:
        folder: root folder of the demo.
        device: "cuda" or "cpu".
        recipe: choices of the demo.
    """

    folder: Path
    device: str
    recipe: Recipe

    @property
    def raw(self) -> Path:
        """Folder of the raw dataset."""
        return self.folder / "raw" / DATASET_NAME

    @property
    def preprocessed(self) -> Path:
        """Folder of the preprocessed dataset and its plans."""
        return self.folder / "preprocessed" / DATASET_NAME

    def model(self, trainer: str) -> Path:
        """Return the model folder of `trainer`."""
        return self.folder / "results" / DATASET_NAME / f"{trainer}__{PLANS_NAME}__2d"

    def predictions(self, trainer: str) -> Path:
        """Return the folder of the test images' segmentations by `trainer`."""
        return self.folder / "predictions" / trainer

    def environment(self) -> dict[str, str]:
        """Return the environment of nnU-Net's commands; its folders are inside the demo's, never the user's own."""
        users = {name: value for name, value in os.environ.items() if name != PRESEGMENTOR_FOLDER}
        return {
            **with_trainers(users),
            **{f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_def_n_proc": "2",  # each worker imports torch, which takes longer than processing so few images
            "nnUNet_compile": "f",  # compiling takes longer than it saves in such a short training
            "OMP_WAIT_POLICY": "passive",  # idle threads free the cores for nnU-Net's augmentation workers
            "PYTHONUNBUFFERED": "1",
            "PYTHONWARNINGS": "ignore",
        }


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `demo` to the command line."""
    parser = subparsers.add_parser(
        "demo", help="generate images, train, predict, report (about 10 minutes on two cores)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("demo"), help="folder for all files of the demo (default: demo)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU, else cpu")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the demo with its default recipe."""
    run_recipe(options.folder, options.device, Recipe())
    return 0


def run_recipe(folder: Path, device: str | None, recipe: Recipe) -> Path:
    """Run the demo in `folder`. Steps that an earlier run finished are skipped.

    Args:
        folder: root folder of the demo; created if it is missing.
        device: "cuda", "cpu", or None for the GPU if there is one.
        recipe: choices of the demo.

    Returns:
        Path of the report, folder/report.md.

    Raises:
        CommandError: a step failed, or the folder holds files of something else.
    """
    place = Workplace(claim(Path(folder).resolve(), recipe), device or default_device(), recipe)
    steps = demo_steps(place)
    began = time.monotonic()
    print(f"Demo in {place.folder} on {place.device}: {len(steps)} steps", flush=True)
    for number, (name, action) in enumerate(steps.items(), start=1):
        mark = place.folder / "finished" / name.replace(" ", "_")
        title = f"[{number}/{len(steps)}] {name}"
        if mark.exists():
            print(f"{title}: already done", flush=True)
            continue
        print(f"{title} ...", flush=True)
        step_began = time.monotonic()
        action()
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        print(f"{title}: done in {clock(time.monotonic() - step_began)}", flush=True)
    report = place.folder / "report.md"
    print(f"Finished in {clock(time.monotonic() - began)}; see {report} and {report.with_suffix('.png')}", flush=True)
    return report


def claim(folder: Path, recipe: Recipe) -> Path:
    """Create `folder`, or check that the same recipe created it, so that old results are not taken for new ones."""
    record = folder / "recipe.json"
    wanted = json.dumps(asdict(recipe), indent=2)
    if record.is_file() and record.read_text(encoding="utf-8") != wanted:
        raise CommandError(
            f"{folder} holds a demo of another version; remove it (rm -r '{folder}'), or give another --folder"
        )
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"--folder {folder} is a file; give another folder")
    if not record.is_file() and folder.exists() and any(folder.iterdir()):
        raise CommandError(f"--folder {folder} holds other files than those of a demo; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(wanted, encoding="utf-8")
    return folder


def default_device() -> str:
    """Return "cuda" if torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def demo_steps(place: Workplace) -> dict[str, Callable[[], object]]:
    """Return the name and action of each step, in order. An interrupted step can be run again."""
    from nnunet_diffusion.cli.demo_data import write_dataset

    recipe, number = place.recipe, str(DATASET_ID)
    model = ["-d", number, "-c", "2d", "-f", "0", "-p", PLANS_NAME, "-device", place.device]

    def predict(trainer: str) -> None:
        words = ["-i", str(place.raw / "imagesTs"), "-o", str(place.predictions(trainer)), "-tr", trainer]
        run_command(["nnUNetv2_predict", *words, *model, "-npp", "1", "-nps", "1"], place)

    def train() -> None:
        words = [number, "2d", "0", "-tr", recipe.trainer, "-p", PLANS_NAME, "-device", place.device]
        resume = ["--c"] if any(place.model(recipe.trainer).glob("fold_0/checkpoint_*.pth")) else []
        run_command(["nnUNetv2_train", *words, *resume], place)

    return {
        "generate images": lambda: write_dataset(place.raw, training=recipe.training_images, test=recipe.test_images),
        "plan and preprocess": lambda: plan_and_preprocess(place),
        "train": train,
        "predict with nnU-Net": lambda: predict(recipe.presegmentor),
        "predict with PD-DDPM": lambda: predict(recipe.trainer),
        "evaluate and report": lambda: make_report(place),
    }


def make_report(place: Workplace) -> None:
    """Write the report in a separate process that has the environment of nnU-Net's commands."""
    log = place.folder / "logs" / "report.log"
    module = "nnunet_diffusion.cli.demo_report"
    if stream([sys.executable, "-m", module, str(place.folder), place.device], place.environment(), log):
        raise CommandError(f"the report failed; see its output in {log}, correct the error and run again")


def plan_and_preprocess(place: Workplace) -> None:
    """Plan for this machine and preprocess the dataset."""
    number, recipe = str(DATASET_ID), place.recipe
    run_command(["nnUNetv2_extract_fingerprint", "-d", number, "-np", "2", "--verify_dataset_integrity"], place)
    if place.device == "cpu":
        target = ["-device", "cpu", "-step_seconds", f"{recipe.step_seconds:g}"]
    else:
        target = ["-gpu_memory_target", f"{recipe.memory_target_gb:g}"]
    # in 2D the first of nnU-Net's three numbers is a placeholder for the missing axis
    target += ["-overwrite_target_spacing", "999", *2 * [f"{recipe.spacing:g}"]]
    run_command(["nnunet_diffusion", "plan", "-d", number, *target, "--preprocess", "-c", "2d", "-np", "2"], place)


def run_command(words: Sequence[str], place: Workplace) -> None:
    """Run a command, show its output immediately and append it to a file in `logs/`.

    Args:
        words: command and its arguments.
        place: folders of the demo.

    Raises:
        CommandError: the command failed.
    """
    log = place.folder / "logs" / f"{words[0]}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"$ {' '.join(words)}", flush=True)
    code = stream([find_command(words[0]), *words[1:]], place.environment(), log)
    if code:
        raise CommandError(
            f"{words[0]} failed with exit code {code}; see its output in {log}, correct the error and run again"
        )


def find_command(name: str) -> str:
    """Return the path of a console command in this Python environment, or else on the search path."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.is_file() else shutil.which(name)
    if found is None:
        raise CommandError(f"{name} is not installed in the environment of {sys.executable}; run: pip install nnunetv2")
    return found


def stream(words: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run `words`, copy its output to the terminal and to `log`, and print a sign of life while there is no output.

    Returns:
        Exit code of the command.
    """
    began = last_sign = time.monotonic()
    with (
        log.open("ab") as copy,
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        assert process.stdout is not None
        output = process.stdout.fileno()
        while True:
            if select.select([output], [], [], 1.0)[0]:
                piece = os.read(output, 65536)
                if not piece:
                    break
                copy.write(piece)
                sys.stdout.write(piece.decode(errors="replace"))
                sys.stdout.flush()
                last_sign = time.monotonic()
            elif time.monotonic() - last_sign > SILENCE_SECONDS:
                last_sign = time.monotonic()
                print(f"  ... running for {clock(last_sign - began)}", flush=True)
    return process.returncode


def clock(seconds: float) -> str:
    """Return a duration as minutes:seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
