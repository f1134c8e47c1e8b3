"""The demo's last step: time and evaluate the three methods, draw the reverse process, write the report.

It runs as a separate process, `python -m nnunet_diffusion.cli.demo_report FOLDER DEVICE`, because torch and nnU-Net read the
environment variables that it needs (trainers, waiting threads) when they are imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnunet_diffusion.cli.demo import PLANS_NAME, Recipe, Workplace

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

Labels = NDArray[np.integer[Any]]
FIGURE_KINDS = ("malignant", "benign", "cyst")
FIGURE_STEPS = 5
FIGURE_START_STEP = 500
"""T' of the figure: the state shows nothing of the mask there."""
SPACING_PIXELS = (1.0, 1.0)
TEMPLATE = """# Demo of nnunet-diffusion

{recipe.training_images} generated training images; {with_lesion} test images with a lesion, {without_lesion} without.
Trainers `{recipe.presegmentor}` and `{recipe.trainer}`, device {device}. Plans `{plans}`, made for this machine: {sizes}.
The training is short and the networks are small: this shows that everything works, not how accurate it can be.

{table}
Dice is the mean over the test images with a lesion (a missed lesion counts 0). HD95 is the mean over the images in which both
truth and result have one. DDPM starts from pure noise and runs without mirroring, to save time; the other two are nnU-Net's
stock prediction with mirroring. In PD-DDPM nnU-Net's own probabilities have a weight of {weight:g}.

{agreement}

![Reverse process](report.png)

The reverse process from nnU-Net's segmentation, here noised to T' = {start_step}, where the state shows nothing of it,
down to 0 in {figure_steps} steps on the whole image, at the network's resolution, without nnU-Net's probabilities in the
result.
Error map: white is correct, red is missed, blue is false positive.
"""


@dataclass(frozen=True, eq=False)
class MethodResult:
    """Result of one method on all test images.

    Attributes:
        name: name in the report's table.
        segmentations: case -> label map (height, width).
        presegmentor_evaluations: mean number of evaluations of nnU-Net's network per image.
        denoiser_evaluations: mean number of evaluations of the denoiser per image.
        seconds: mean time per image, without loading the model.
    """

    name: str
    segmentations: Mapping[str, Labels]
    presegmentor_evaluations: float
    denoiser_evaluations: float
    seconds: float


def write_report(place: Workplace) -> None:
    """Write report.md and report.png into the demo's folder.

    Args:
        place: folders of a demo with trained models, and test images predicted by nnUNetv2_predict.
    """
    import torch

    recipe, device = place.recipe, torch.device(place.device)
    cases = sorted(path.stem for path in (place.raw / "labelsTs").glob("*.png"))
    truth = {case: read_labels(place.raw / "labelsTs" / f"{case}.png") for case in cases}
    images = {case: read_labels(place.raw / "imagesTs" / f"{case}_0000.png") for case in cases}

    plain = load_predictor(place.model(recipe.presegmentor), device, mirroring=True)
    diffusion = load_predictor(place.model(recipe.trainer), device, mirroring=True)
    unmirrored = load_predictor(place.model(recipe.trainer), device, mirroring=False)
    settings = unmirrored.network.settings
    from_noise = {
        "from_noise": True, "start_step": settings.timesteps, "steps": recipe.ddpm_steps, "sampler": "ddpm",
        "samples": 1, "presegmentation_weight": 0.0,
    }  # fmt: skip
    results = [
        time_method("nnU-Net", plain, images),
        time_method(
            f"DDPM from noise, {recipe.ddpm_steps} steps", unmirrored, images,
            lambda: unmirrored.network.overridden(**from_noise),
        ),
        time_method(f"PD-DDPM, T' = {settings.start_step}, {settings.steps} step(s)", diffusion, images),
    ]  # fmt: skip
    agreement = [
        agreement_line(results[0], place.predictions(recipe.presegmentor)),
        agreement_line(results[2], place.predictions(recipe.trainer)),
    ]
    draw_figure(place.folder / "report.png", plain, diffusion, images, truth)
    text = report_text(place, results, truth, settings, agreement)
    (place.folder / "report.md").write_text(text, encoding="utf-8")
    print(text, flush=True)


def read_labels(path: Path) -> Labels:
    """Return the pixels of a grey PNG, (height, width)."""
    import SimpleITK

    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def load_predictor(model: Path, device: Any, *, mirroring: bool) -> nnUNetPredictor:
    """Return nnU-Net's own predictor with the final weights of fold 0."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):  # hides what the search for the trainer's class prints
        predictor = nnUNetPredictor(use_mirroring=mirroring, device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
    # nnU-Net's predictor loads the weights only when it predicts; the figure needs them earlier
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    predictor.network.to(device).eval()
    return predictor


def time_method(
    name: str,
    predictor: nnUNetPredictor,
    images: Mapping[str, Labels],
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> MethodResult:
    """Segment every image in this process and measure time and network evaluations.

    Args:
        name: name in the report's table.
        predictor: predictor with the model.
        images: case -> grey values (height, width).
        settings: returns the context manager in which to predict.
    """
    from tqdm import tqdm

    network = predictor.network
    segmentations: dict[str, Labels] = {}
    with settings(), counted_calls(getattr(network, "presegmentor", network)) as calls:
        network.evaluations = 0
        began = time.perf_counter()
        for case in tqdm(images, desc=name):
            image = images[case][None, None].astype(np.float32)
            segmentations[case] = predictor.predict_single_npy_array(image, image_properties(), None, None, False)[0]
        seconds = time.perf_counter() - began
    count = len(images)
    return MethodResult(name, segmentations, len(calls) / count, network.evaluations / count, seconds / count)


def image_properties() -> dict[str, Any]:
    """Return the properties that nnU-Net's reader gives a PNG; 999 is a placeholder for the missing axis."""
    return {"spacing": (999, *SPACING_PIXELS)}


@contextlib.contextmanager
def counted_calls(module: Any) -> Iterator[list[None]]:
    """Yield a list that gets one entry for each call of `module` in the `with` block."""
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def agreement_line(result: MethodResult, folder: Path) -> str:
    """Return a sentence that says how many segmentations equal those of nnUNetv2_predict."""
    same = sum(
        np.array_equal(read_labels(folder / f"{case}.png"), labels) for case, labels in result.segmentations.items()
    )
    return f"{result.name}: {same} of {len(result.segmentations)} segmentations equal those of `nnUNetv2_predict`."


def draw_figure(
    path: Path,
    plain: nnUNetPredictor,
    diffusion: nnUNetPredictor,
    images: Mapping[str, Labels],
    truth: Mapping[str, Labels],
) -> None:
    """Draw one case of each kind: its reverse process in FIGURE_STEPS steps from nnU-Net's segmentation at FIGURE_START_STEP.

    Args:
        path: file to write.
        plain: predictor with nnU-Net, from whose prediction the process starts.
        diffusion: predictor with the DiffusionSegmenter.
        images: case -> grey values (height, width).
        truth: case -> label map.
    """
    from nnunet_diffusion.explain.figures import ReportRow, report_figure

    rows = []
    for kind in FIGURE_KINDS:
        case = next((name for name in images if name.startswith(kind)), None)
        if case is None:
            continue
        start, process, result = process_of(plain, diffusion, images[case])
        rows.append(ReportRow(case, images[case], truth[case], start, process, result))
    report_figure(rows, path)


def figure_start_step(settings: Any) -> int:
    """Return T' of the figure for a model's settings."""
    return min(FIGURE_START_STEP, settings.max_train_step)


def process_of(
    plain: nnUNetPredictor, diffusion: nnUNetPredictor, image: Labels
) -> tuple[Labels, list[tuple[int, NDArray]], Labels]:
    """Run one reverse process on the whole image, at the network's resolution.

    Args:
        plain: predictor with nnU-Net, from whose prediction the process starts.
        diffusion: predictor with the DiffusionSegmenter.
        image: grey values (height, width).

    Returns:
        Label map (height, width) of the start; pairs of timestep and state of class 1 in [0, 1], of which the last has
        timestep -1 and no noise; label map of the result.
    """
    import torch
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    from nnunet_diffusion.explain.reverse_process import reverse_process
    from nnunet_diffusion.model.labels import probabilities_to_logits

    network, managers = diffusion.network, (diffusion.plans_manager, diffusion.configuration_manager)
    preprocessor = managers[1].preprocessor_class(verbose=False)
    given = image[None, None].astype(np.float32), None, image_properties()
    data, _, properties = preprocessor.run_case_npy(*given, *managers, diffusion.dataset_json)
    data = torch.from_numpy(data)

    def labels(logits: torch.Tensor) -> Labels:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, *managers, diffusion.label_manager, properties
        )[0]

    logits = plain.predict_logits_from_preprocessed_data(data).cpu().float()
    start_step = figure_start_step(network.settings)
    found = reverse_process(
        network,
        data[:, 0].to(diffusion.device),
        logits[:, 0].softmax(0).to(diffusion.device),
        start_step=start_step,
        steps=min(FIGURE_STEPS, start_step),
        from_noise=False,
    )
    states = [*found.states, (-1, found.result)]
    result = labels(probabilities_to_logits(torch.from_numpy(found.result)[None])[0, :, None])
    return labels(logits), [(timestep, state[1]) for timestep, state in states], result


def report_text(
    place: Workplace,
    results: Sequence[MethodResult],
    truth: Mapping[str, Labels],
    settings: Any,
    agreement: Sequence[str],
) -> str:
    """Return the report in markdown."""
    from nnunet_diffusion.evaluation.comparison import markdown_table

    lesions = [case for case in truth if truth[case].any()]
    header = ["method", "Dice", "HD95 (pixels)", "lesions missed", f"false alarms (of {len(truth) - len(lesions)})"]
    header += ["evaluations per image (nnU-Net + denoiser)", "seconds per image"]
    rows = [[result.name, *quality_cells(result, truth), *cost_cells(result)] for result in results]
    return TEMPLATE.format(
        recipe=place.recipe,
        plans=PLANS_NAME,
        sizes=planned_sizes(place.model(place.recipe.trainer)),
        device=place.device,
        with_lesion=len(lesions),
        without_lesion=len(truth) - len(lesions),
        table=markdown_table(header, rows),
        agreement="\n".join(agreement),
        weight=settings.presegmentation_weight,
        start_step=figure_start_step(settings),
        figure_steps=FIGURE_STEPS,
    )


def planned_sizes(model: Path) -> str:
    """Return patch, batch and widths in words."""
    from nnunet_diffusion.model.settings import DiffusionSettings, topology_of

    configuration = json.loads((model / "plans.json").read_text(encoding="utf-8"))["configurations"]["2d"]
    patch = " x ".join(map(str, configuration["patch_size"]))
    settings = DiffusionSettings.from_plans(configuration)
    widths = topology_of(configuration)["features_per_stage"], settings.features_per_stage
    nnunet, denoiser = (" ".join(map(str, width)) for width in widths)
    own = "the denoiser is of the same size" if settings.denoiser == "nnunet" else f"the denoiser's {denoiser}"
    return f"patch {patch}, batch {configuration['batch_size']}, nnU-Net's width {nnunet}, {own}"


def quality_cells(result: MethodResult, truth: Mapping[str, Labels]) -> list[str]:
    """Return Dice, HD95, missed lesions and false alarms of one method."""
    from nnunet_diffusion.evaluation.comparison import number
    from nnunet_diffusion.evaluation.metrics import dice, hd95

    pairs = [(result.segmentations[case] == 1, truth[case] == 1) for case in truth]
    with_lesion = [pair for pair in pairs if pair[1].any()]
    distances = [hd95(*pair, SPACING_PIXELS) for pair in with_lesion if pair[0].any()]
    return [
        number(float(np.mean([dice(*pair) for pair in with_lesion])), 3),
        number(float(np.mean(distances)) if distances else float("nan"), 1),
        str(sum(not predicted.any() for predicted, _ in with_lesion)),
        str(sum(bool(predicted.any()) for predicted, true in pairs if not true.any())),
    ]


def cost_cells(result: MethodResult) -> list[str]:
    """Return network evaluations and seconds of one method."""
    evaluations = f"{result.presegmentor_evaluations:.0f} + {result.denoiser_evaluations:.0f}"
    return [evaluations, f"{result.seconds:.2f}"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_report(Workplace(folder, sys.argv[2], Recipe(**json.loads((folder / "recipe.json").read_text()))))
