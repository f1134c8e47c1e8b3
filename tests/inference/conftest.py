"""A model's plans without a model, for what happens before and after the networks."""

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def make_managers(spacing=(1.0, 1.0, 1.0), channels=1, classes=3, reader="SimpleITKIO", ending=".nii.gz"):
    """Plans, configuration and dataset.json as nnU-Net's planner writes them by default."""

    def resampling(order, is_seg=False):
        return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}

    kinds = {"data": resampling(3), "seg": resampling(1, True), "probabilities": resampling(1)}
    configuration = {
        "architecture": {"network_class_name": "a.B", "arch_kwargs": {}, "_kw_requires_import": []},
        "preprocessor_name": "DefaultPreprocessor",
        "spacing": list(spacing),
        "patch_size": [32] * len(spacing),
        "batch_size": 2,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        **{f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in kinds},
        **{f"resampling_fn_{kind}_kwargs": keywords for kind, keywords in kinds.items()},
    }
    plans = PlansManager(
        {
            "dataset_name": "Dataset001_A",
            "plans_name": "Plans",
            "image_reader_writer": reader,
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(channels)},
            "configurations": {"one": configuration},
        }
    )
    description = {
        "channel_names": {str(channel): "MR" for channel in range(channels)},
        "labels": {"background": 0, **{f"class {label}": label for label in range(1, classes)}},
        "file_ending": ending,
    }
    return plans, plans.get_configuration("one"), description


@pytest.fixture(scope="session")
def managers_of():
    """`make_managers`."""
    return make_managers
