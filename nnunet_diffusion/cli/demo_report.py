"""The demo's last step: time and evaluate the three methods, draw the reverse process, write the report.

A process of its own, `python -m nnunet_diffusion.cli.demo_report FOLDER DEVICE`, because the variables that it needs
(where nnU-Net finds the trainers, how threads wait) are read when torch and nnU-Net are loaded.
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
SPACING_PIXELS = (1.0, 1.0)
TEMPLATE = """# Demo of nnunet-diffusion

{recipe.training_images} generated training images; {with_lesion} test images with a lesion, {without_lesion} without.
Trainers `{recipe.presegmentor}` and `{recipe.trainer}`, device {device}. Plans `{plans}`, made for this machine: {sizes}.
The training is brief and the networks are small: this shows that everything works, not how good it gets.

{table}
Dice is the mean over the test images with a lesion (a miss counts 0); HD95 the mean over those where both truth and
result show one. DDPM starts from pure noise and runs without mirroring, to spare time; the other two are nnU-Net's
stock prediction with mirroring. In PD-DDPM nnU-Net's own probabilities count with a weight of {weight:g}.

{agreement}

![Reverse process](report.png)

From nnU-Net's segmentation noised to T' = {start_step} down to 0, here in {figure_steps} steps over the whole image, at the
network's resolution, and without nnU-Net's probabilities in the result.
Error map: white right, red missed, blue too much.
"""


@dataclass(frozen=True, eq=False)
class MethodResult:
    """One method on all test images.

    Attributes:
        name: As in the table.
        segmentations: Label map (height, width) of each case.
        presegmentor_evaluations: Calls of nnU-Net's network, mean per image.
        denoiser_evaluations: Calls of the denoiser, mean per image.
        seconds: Mean per image, the model already loaded.
    """

    name: str
    segmentations: Mapping[str, Labels]
    presegmentor_evaluations: float
    denoiser_evaluations: float
    seconds: float


def write_report(place: Workplace) -> None:
    """Write report.md and report.png into the demo's folder.

    Args:
        place: A demo whose models are trained and whose test images are predicted by the stock command.
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
    """Pixels of a grey PNG, (height, width)."""
    import SimpleITK

    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def load_predictor(model: Path, device: Any, *, mirroring: bool) -> nnUNetPredictor:
    """nnU-Net's own predictor with the final weights of fold 0."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    with contextlib.redirect_stdout(io.StringIO()):  # the search for the trainer's class is long-winded
        predictor = nnUNetPredictor(use_mirroring=mirroring, device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), use_folds=(0,))
    # the stock predictor loads the weights when it predicts; the figure needs them before
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    predictor.network.to(device).eval()
    return predictor


def time_method(
    name: str,
    predictor: nnUNetPredictor,
    images: Mapping[str, Labels],
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> MethodResult:
    """Segment every image in process, counting seconds and network evaluations.

    Args:
        name: As in the table.
        predictor: Holds the model.
        images: Grey values (height, width) of each case.
        settings: Makes the context to predict in.
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
    """What nnU-Net's reader says of a PNG: 999 stands for the missing axis."""
    return {"spacing": (999, *SPACING_PIXELS)}


@contextlib.contextmanager
def counted_calls(module: Any) -> Iterator[list[None]]:
    """List that grows by one entry with each call of `module` inside the context."""
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def agreement_line(result: MethodResult, folder: Path) -> str:
    """Sentence on how far the timed segmentations equal those of the stock command."""
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
    """Draw one case of each kind: its reverse process in FIGURE_STEPS steps from nnU-Net's segmentation at T'.

    Args:
        path: Where to write.
        plain: Holds nnU-Net, whose stock prediction is the start.
        diffusion: Holds the DiffusionSegmenter.
        images: Grey values (height, width) of each case.
        truth: Label map of each case.
    """
    from nnunet_diffusion.explain.figures import ReportRow, report_figure

    rows = []
    for kind in FIGURE_KINDS:
        case = next((name for name in images if name.startswith(kind)), None)
        if case is None:
            continue
        start, process, result = reverse_process(plain, diffusion, images[case])
        rows.append(ReportRow(case, images[case], truth[case], start, process, result))
    report_figure(rows, path)


def reverse_process(
    plain: nnUNetPredictor, diffusion: nnUNetPredictor, image: Labels
) -> tuple[Labels, list[tuple[int, NDArray]], Labels]:
    """States of one reverse process over the whole image, at the network's resolution, and the label maps at its ends.

    Args:
        plain: Holds nnU-Net, whose stock prediction is the start.
        diffusion: Holds the DiffusionSegmenter.
        image: Grey values (height, width).

    Returns:
        Label map (height, width) of the start; (timestep, state of class 1) pairs, the last one clean with timestep -1;
        label map of the result.
    """
    import torch
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    from nnunet_diffusion.model.labels import probabilities_to_logits

    network, managers = diffusion.network, (diffusion.plans_manager, diffusion.configuration_manager)
    preprocessor = managers[1].preprocessor_class(verbose=False)
    given = image[None, None].astype(np.float32), None, image_properties()
    data, _, properties = preprocessor.run_case_npy(*given, *managers, diffusion.dataset_json)
    data = torch.from_numpy(data)
    height, width = data.shape[2:]
    divisor = 2 ** len(network.settings.features_per_stage)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.float().to(diffusion.device)[None]
        return torch.nn.functional.pad(tensor, (0, -width % divisor, 0, -height % divisor), mode="replicate")

    def labels(logits: torch.Tensor) -> Labels:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, *managers, diffusion.label_manager, properties
        )[0]

    states: list[tuple[int, NDArray]] = []

    def keep(timestep: int, noisy: Any, clean: Any) -> None:
        states.append((timestep, noisy[0, 1, :height, :width].float().cpu().numpy()))

    logits = plain.predict_logits_from_preprocessed_data(data).cpu().float()
    steps = min(FIGURE_STEPS, network.settings.start_step)
    with network.overridden(steps=steps, samples=1, presegmentation_weight=0.0):
        probabilities = network.sample(padded(data[:, 0]), padded(logits[:, 0].softmax(0)), on_step=keep)
    probabilities = probabilities[:, :, :height, :width].float().cpu()
    states.append((-1, network.process.to_state(probabilities)[0, 1].numpy()))
    return labels(logits), states, labels(probabilities_to_logits(probabilities)[0, :, None])


def report_text(
    place: Workplace,
    results: Sequence[MethodResult],
    truth: Mapping[str, Labels],
    settings: Any,
    agreement: Sequence[str],
) -> str:
    """The report in markdown."""
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
        start_step=settings.start_step,
        figure_steps=FIGURE_STEPS,
    )


def planned_sizes(model: Path) -> str:
    """Patch, batch and widths in words."""
    from nnunet_diffusion.model.settings import DiffusionSettings, topology_of

    configuration = json.loads((model / "plans.json").read_text(encoding="utf-8"))["configurations"]["2d"]
    patch = " x ".join(map(str, configuration["patch_size"]))
    widths = (
        topology_of(configuration)["features_per_stage"],
        DiffusionSettings.from_plans(configuration).features_per_stage,
    )
    nnunet, denoiser = (" ".join(map(str, width)) for width in widths)
    return f"patch {patch}, batch {configuration['batch_size']}, nnU-Net's width {nnunet}, the denoiser's {denoiser}"


def quality_cells(result: MethodResult, truth: Mapping[str, Labels]) -> list[str]:
    """Dice, HD95, missed lesions and false alarms of one method."""
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
    """Network evaluations and seconds of one method."""
    evaluations = f"{result.presegmentor_evaluations:.0f} + {result.denoiser_evaluations:.0f}"
    return [evaluations, f"{result.seconds:.2f}"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_report(Workplace(folder, sys.argv[2], Recipe(**json.loads((folder / "recipe.json").read_text()))))
