"""Packaging of nnunet-diffusion; the build system and the tools' settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SOLVERS = ["diffusers>=0.27"]
CLUSTER = ["submitit>=1.5"]


def read_version() -> str:
    """Version string of the package, read without importing it (and so without importing torch)."""
    text = (ROOT / "nnunet_diffusion" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


def read_long_description() -> str:
    """Text of README.md, or an empty string in a tree that has none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


# nnU-Net's trainer search may import this file as an ordinary module, so importing it must do nothing.
if __name__ == "__main__":
    setup(
        name="nnunet-diffusion",
        version=read_version(),
        description="Diffusion segmentation (PGDiffSeg, PD-DDPM, HiDiff) as an external nnU-Net v2 trainer",
        long_description=read_long_description(),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.10",
        packages=[
            *find_packages(include=["nnunet_diffusion", "nnunet_diffusion.*"]),
            "nnunet_diffusion.trainers",
            "nnunet_diffusion.planners",
        ],
        # The two folders stand at the top of the repository but never become top-level packages.
        package_dir={"nnunet_diffusion.trainers": "trainers", "nnunet_diffusion.planners": "planners"},
        install_requires=[
            "nnunetv2>=2.8.0",
            "torch>=2.10",
            "dynamic-network-architectures",
            "acvl-utils",
            "batchgenerators",
            "matplotlib",
            "nibabel",
            "numpy",
            "packaging",
            "scikit-image",
            "scipy",
            "SimpleITK",
            "tqdm",
        ],
        extras_require={
            "solvers": SOLVERS,
            "cluster": CLUSTER,
            "dev": [
                "build",
                "captum",
                "mypy>=1.10",
                "pytest>=8",
                "pytest-timeout",
                "pytest-xdist>=3.8",
                "ruff>=0.6",
                *CLUSTER,
                "wandb>=0.19.10",
            ],
        },
        entry_points={"console_scripts": ["nnunet_diffusion=nnunet_diffusion.cli.main:main"]},
        classifiers=[
            "Intended Audience :: Science/Research",
            "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Medical Science Apps.",
        ],
    )
