"""Configurations of nnU-Net's plans, and datasets that consist of a fingerprint."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # its scripts use that module too
from fingerprint_dataset import write_fingerprint_dataset

NAME = "Dataset900_Sizes"


def make_configuration(patch, batch=2, width=16, stages=3, residual=False):
    """A resolved configuration as nnU-Net's planners write it: PlainConvUNet or ResidualEncoderUNet."""
    axes = len(patch)
    kind = f"Conv{axes}d"
    network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    return {
        "patch_size": list(patch),
        "batch_size": batch,
        "architecture": {
            "network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": [width * 2**stage for stage in range(stages)],
                "conv_op": f"torch.nn.modules.conv.{kind}",
                "kernel_sizes": [[3] * axes] * stages,
                "strides": [[1] * axes, *[[2] * axes] * (stages - 1)],
                blocks: [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }


@pytest.fixture
def configuration():
    """`make_configuration`."""
    return make_configuration


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
    """Makes a dataset of tiny files whose fingerprint says `shape` and `spacing`; returns its preprocessed folder."""

    def make(shape, spacing, cases=20, channels=("CT",), labels=("background", "organ")):
        for kind in ("raw", "preprocessed", "results"):
            monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        preprocessed = tmp_path / "preprocessed" / NAME
        write_fingerprint_dataset(tmp_path / "raw" / NAME, preprocessed, [shape] * cases, spacing, channels, labels)
        return preprocessed

    return make
