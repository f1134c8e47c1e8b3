"""What `predict_from_files` is asked for: its arguments, checked, and the cases they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_diffusion.files import find_images, refuse_overwriting
from nnunet_diffusion.inference.cases import CaseFiles
from nnunet_diffusion.model.settings import DiffusionSettings


@dataclass(frozen=True)
class Request:
    """Arguments of `DiffusionPredictor.predict_from_files`, under their names there."""

    list_of_lists_or_source_folder: str | list[list[str]]
    output_folder_or_list_of_truncated_output_files: str | list[str] | None
    save_probabilities: bool
    overwrite: bool
    num_processes_preprocessing: int | None
    num_processes_segmentation_export: int | None
    folder_with_segs_from_prev_stage: str | None
    num_parts: int
    part_id: int
    presegmentation_folder: str | None

    @property
    def output_folder(self) -> Path | None:
        """Folder of the output; None if nothing is written."""
        target = self.output_folder_or_list_of_truncated_output_files
        if not target:
            return None
        return Path(target[0]).parent if isinstance(target, list) else Path(target)

    def check(self, settings: DiffusionSettings, configuration: ConfigurationManager) -> None:
        """Raise ValueError if the arguments do not go together, or not with the model."""
        number, of = self.part_id, self.num_parts
        if not 0 <= number < of:
            raise ValueError(f"part_id is {number}; it must be 0 to num_parts - 1 = {of - 1}")
        given = self.presegmentation_folder
        if given is not None and settings.from_noise:
            raise ValueError(
                f"The model starts from pure noise (from_noise in its plans), so what {given} holds would not be the start: "
                "give a start step too (--start_step)."
            )
        previous, folder = configuration.previous_stage_name, self.folder_with_segs_from_prev_stage
        if previous is not None and folder is None:
            raise ValueError(f"This configuration needs the segmentations of {previous}: give their folder.")
        if previous is None and folder is not None:
            raise ValueError(
                f"This configuration has no previous stage, whose segmentations {folder} would be: leave them out, or give "
                "them as presegmentation_folder (--presegmentation) to start from."
            )

    def find_cases(self, ending: str) -> tuple[list[CaseFiles], dict[str, str]]:
        """Return the cases of all parts, and the images left out with the reason for each.

        Args:
            ending: of the dataset's files, such as ".nii.gz".

        Raises:
            FileNotFoundError: the folder has no images.
            ValueError: a case would overwrite an input.
        """
        source = self.list_of_lists_or_source_folder
        output = self.output_folder_or_list_of_truncated_output_files
        previous, given = self.folder_with_segs_from_prev_stage, self.presegmentation_folder
        left_out: dict[str, str] = {}
        if isinstance(source, list):
            names, images = [Path(files[0]).name[: -len(f"_0000{ending}")] for files in source], source
        else:
            found = find_images(source, ending)
            names, images, left_out = list(found.cases), list(found.cases.values()), found.left_out
        targets = (
            output if isinstance(output, list) else [str(Path(output, name)) for name in names] if output else None
        )
        if targets is not None:
            folders = {"-i": None if isinstance(source, list) else source}
            folders |= {"--presegmentation": given, "-prev_stage_predictions": previous}
            refuse_overwriting([Path(target) for target in targets], ending, images, folders)
        cases = [
            CaseFiles(
                Path(targets[number]).name if targets else names[number],
                files,
                targets[number] if targets else None,
                None if previous is None else str(Path(previous, f"{names[number]}{ending}")),
                given,
            )
            for number, files in enumerate(images)
        ]
        return cases, left_out
