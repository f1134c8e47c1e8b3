"""Scores of a container's results against several raters: `python -m nnunet_diffusion.container.score`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_diffusion.cli.main import main as command
from nnunet_diffusion.container.entry import GRAND_CHALLENGE, ending_of
from nnunet_diffusion.files import read_dictionary, write_json

CURE = "write the container's folder again"


def results(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, Path, list[Path]]]:
    """Yield name, label map and maps of probabilities of each case.

    Args:
        folder: output of an image with the folder interface; of Grand Challenge's, a folder with the output of each case
            (`CASE/images/SLUG/output.mha`).
        settings: of the container.
    """
    slugs = settings["probabilities_slugs"]
    if settings["interface"] == GRAND_CHALLENGE:
        for path in sorted(folder.glob(f"*/images/{settings['output_slug']}/output.mha")):
            images = path.parents[1]
            yield path.parents[2].name, path, [images / slug / path.name for slug in slugs]
        return
    for path in sorted(folder.iterdir()):
        if path.is_file() and (ending := ending_of(path.name)):
            name = f"{path.name[: -len(ending)]}{'.tif' if ending == '.png' else ending}"
            yield path.name[: -len(ending)], path, [folder / slug / name for slug in slugs]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write results as nnU-Net does, and compare them with the raters by `nnunet_diffusion evaluate`. Return its exit code."""
    parser = argparse.ArgumentParser(prog="score.sh", description=__doc__)
    parser.add_argument("settings", type=Path, help="container.json")
    parser.add_argument("outputs", type=Path, help="output of the container")
    parser.add_argument("scores", type=Path, help="new folder for what is compared and the scores")
    parser.add_argument(
        "raters", nargs="+", help="folder of one rater's label maps, named CASE and the dataset's ending"
    )
    options = parser.parse_args(arguments)
    try:
        settings = read_dictionary(options.settings, CURE, {"dataset": dict})
        found = list(results(options.outputs, settings))
        if not found:
            raise ValueError(f"{options.outputs} has no result of this container: run it first")
    except (OSError, ValueError) as error:
        print(f"score.sh: error: {error}", file=sys.stderr)
        return 2
    target, dataset = options.scores / "predictions", settings["dataset"]
    target.mkdir(parents=True, exist_ok=True)
    write_json(dataset, target / "dataset.json")
    for name, path, maps in found:
        sitk.WriteImage(sitk.ReadImage(str(path)), str(target / f"{name}{dataset['file_ending']}"), True)
        if maps:
            values = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(each))) for each in maps])
            values = values if values.ndim == 4 else values[:, None]
            if "regions_class_order" not in dataset:  # the background is what the classes leave
                values = np.concatenate([1 - values.sum(0, keepdims=True), values]).clip(0, 1)
            np.savez_compressed(target / f"{name}.npz", probabilities=values)
    raters = [word for rater in options.raters for word in ("-g", rater)]
    return command(["evaluate", "-p", str(target), *raters, "-o", str(options.scores), "-np", "0"])


if __name__ == "__main__":
    sys.exit(main())
