"""Procedural 2D images that resemble breast ultrasound, written as an nnU-Net raw dataset.

The image formation is a short form of the usual speckle model. Complex Gaussian scatterers, weighted by a map of
echogenicity in dB, are blurred by the pulse, so that the envelope is Rayleigh distributed with a finite correlation
length. Averaging over looks (compounding) makes its distribution gamma-like. Attenuation is integrated along the beam
(downwards), which yields the shadow below malignant lesions and the enhancement below cysts without drawing either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d

Array = NDArray[np.float64]

KINDS = ("cyst", "benign", "malignant", "normal")
# kind of each case by its number, repeated: three in seven are malignant, one in seven has no lesion
KIND_CYCLE = ("malignant", "benign", "normal", "malignant", "cyst", "benign", "malignant")
# relative to the surroundings: echogenicity (dB) and attenuation (dB per pixel); then blur of the margin (pixels)
LESION_RANGES = {
    "cyst": ((-26.0, -17.0), (-0.38, -0.2), (0.8, 1.5)),
    "benign": ((-13.0, -6.5), (-0.10, 0.02), (1.0, 2.2)),
    "malignant": ((-14.0, -7.0), (0.05, 0.28), (1.5, 4.0)),
}


@dataclass(frozen=True)
class UltrasoundImage:
    """One image with its ground truth.

    Attributes:
        image: grey values, uint8, (height, width); depth is the first axis.
        mask: 1 inside the lesion, else 0; uint8, same shape.
        kind: one of KINDS.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    kind: str


@dataclass(frozen=True)
class Tissue:
    """Acoustic maps of one scan plane, each float64 of shape (height, width).

    Attributes:
        echogenicity_db: mean backscatter.
        attenuation_db: two-way loss per pixel of depth beyond the machine's compensation; negative for enhancement.
        specular: amplitude of smooth reflectors such as fascia and septa, relative to an echogenicity of 0 dB.
    """

    echogenicity_db: Array
    attenuation_db: Array
    specular: Array


def generate_image(kind: str, seed: int) -> UltrasoundImage:
    """Generate one image; the same kind and seed give the same pixels.

    Args:
        kind: one of KINDS.
        seed: non-negative integer.

    Returns:
        Image of 144 to 192 by 160 to 192 pixels and its mask (empty for kind "normal").

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    shape = (int(rng.integers(144, 193)), int(rng.integers(160, 193)))
    tissue = layered_tissue(shape, rng)
    mask = np.zeros(shape, dtype=np.uint8)
    if kind != "normal":
        tissue, mask = insert_lesion(tissue, kind, rng)
    return UltrasoundImage(insonify(tissue, rng), mask, kind)


def smooth_noise(shape: tuple[int, ...], sigma: tuple[float, ...], rng: np.random.Generator) -> Array:
    """Return a Gaussian random field with correlation lengths `sigma` (pixels), mean 0 and standard deviation 1."""
    field = gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap" if len(shape) == 1 else "reflect")
    return (field - field.mean()) / (field.std() + 1e-12)


def ridges(shape: tuple[int, int], sigma: tuple[float, float], width: float, rng: np.random.Generator) -> Array:
    """Return thin curved lines, 0 to 1: the zero crossings of a smooth field, faded out in patches."""
    lines = np.exp(-((smooth_noise(shape, sigma, rng) / width) ** 2))
    patches = np.clip(0.4 + 0.5 * smooth_noise(shape, (6.0, 12.0), rng), 0.0, 1.0)
    return lines * patches * (0.6 + 0.4 * smooth_noise(shape, (1.0, 1.5), rng))


def layered_tissue(shape: tuple[int, int], rng: np.random.Generator) -> Tissue:
    """Return skin, subcutaneous fat with septa, glandular tissue with fat lobules, and muscle with striations."""
    height, width = shape
    depth = np.arange(height, dtype=np.float64)[:, None]

    def interface(fraction: tuple[float, float], roughness_px: float) -> Array:
        waves = smooth_noise((width,), (width / 9.0,), rng)[None]
        return rng.uniform(*fraction) * height + roughness_px * waves

    def below(surface: Array, softness_px: float = 1.5) -> Array:
        return 0.5 + 0.5 * np.tanh((depth - surface) / softness_px)

    skin, gland, muscle = interface((0.02, 0.05), 0.6), interface((0.14, 0.3), 5.0), interface((0.68, 0.88), 5.0)
    in_fat, in_gland, in_muscle = below(skin) - below(gland), below(gland) - below(muscle), below(muscle)
    lobules = np.clip(smooth_noise(shape, (5.0, 9.0), rng) - rng.uniform(0.9, 1.4), 0.0, 0.6) / 0.6
    clouds = 2.5 * smooth_noise(shape, (5.0, 10.0), rng) + 1.5 * smooth_noise(shape, (2.0, 3.5), rng)
    echogenicity = (
        4.0 * (1.0 - below(skin))
        + in_fat * (-9.0 + 0.5 * clouds)
        + in_gland * (rng.uniform(-3.0, 1.0) + clouds - rng.uniform(5.0, 10.0) * lobules)
        + in_muscle * (-9.0 + 0.5 * clouds)
    )
    specular = (
        2.2 * np.exp(-(((depth - skin) / 1.2) ** 2))
        + in_fat * 1.6 * ridges(shape, (3.0, 16.0), 0.16, rng)
        + in_gland * rng.uniform(0.5, 3.0) * ridges(shape, (2.2, 14.0), 0.25, rng)
        + in_muscle * 2.0 * ridges(shape, (1.7, 26.0), 0.25, rng)
        + 1.2 * np.exp(-(((depth - muscle) / 1.5) ** 2)) * (smooth_noise((width,), (9.0,), rng)[None] > -0.3)
    )
    # columns that are darker from the skin downwards, as below poor contact and ligaments
    columns = np.clip(smooth_noise((width,), (5.0,), rng) - 1.0, 0.0, None)[None] * rng.uniform(0.0, 0.09)
    return Tissue(echogenicity, rng.uniform(0.03, 0.14) + columns + np.zeros(shape), specular)


def insert_lesion(tissue: Tissue, kind: str, rng: np.random.Generator) -> tuple[Tissue, NDArray[np.uint8]]:
    """Insert one lesion into the tissue.

    Returns:
        The changed maps, and the mask as a reader would draw it: slightly off the true margin, with blunt spicules.
    """
    contrast, attenuation, blur = (rng.uniform(*limits) for limits in LESION_RANGES[kind])
    angle, distance, radius, spicules = lesion_outline(tissue.echogenicity_db.shape, kind, rng)
    drawn = radius * (1.0 + 0.025 * np.cos(angle * 2 + rng.uniform(0, 6.3)) + rng.normal(0.0, 0.02)) + 0.4 * spicules
    mask = (distance < drawn).astype(np.uint8)

    inside = 0.5 + 0.5 * np.tanh((radius + spicules - distance) / blur)
    rim = np.exp(-(((distance - radius - 2.0 * blur) / (2.0 * blur)) ** 2))
    texture = smooth_noise(mask.shape, (3.0, 4.0), rng) * {"cyst": 0.5, "benign": 1.5, "malignant": 2.8}[kind]
    surroundings = gaussian_filter(tissue.echogenicity_db, 12.0)
    echogenicity = tissue.echogenicity_db * (1.0 - inside) + inside * (surroundings + contrast + texture)
    echogenicity = echogenicity + rim * {"cyst": 1.0, "benign": 1.5, "malignant": 3.0}[kind]
    calcifications = (rng.random(mask.shape) < 0.004) * inside * (kind == "malignant") * rng.uniform(0.0, 6.0)
    return (
        Tissue(
            echogenicity,
            tissue.attenuation_db + inside * attenuation,
            tissue.specular * (1.0 - inside) + gaussian_filter(calcifications, 0.5),
        ),
        mask,
    )


def lesion_outline(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> tuple[Array, Array, Array, Array]:
    """Return the outline of a lesion in polar coordinates around a random centre.

    Returns:
        Four arrays of `shape`: angle (radians) and distance (pixels) of each pixel, radius of the body at that angle,
        and length of the spicules beyond it (pixels; 0 unless malignant).
    """
    height, width = shape
    malignant = kind == "malignant"
    semi_width = rng.uniform(0.07, 0.2) * width
    semi_height = semi_width * (rng.uniform(0.7, 1.3) if malignant else rng.uniform(0.5, 0.85))
    center = (rng.uniform(0.3, 0.62) * height, rng.uniform(0.2, 0.8) * width)
    tilt = rng.normal(0.0, 0.25)
    down, right = np.mgrid[:height, :width].astype(np.float64)
    down, right = down - center[0], right - center[1]
    angle = np.arctan2(down, right) - tilt
    distance = np.hypot(down, right)
    radius = semi_width * semi_height / np.hypot(semi_height * np.cos(angle), semi_width * np.sin(angle))
    strength = 0.11 if malignant else 0.035
    for order in range(2, 7 if malignant else 5):
        radius = radius * (1.0 + strength * rng.normal() / order**0.5 * np.cos(order * angle + rng.uniform(0, 6.3)))
    spicules = np.zeros_like(radius)
    for _ in range(int(rng.integers(5, 11)) if malignant else 0):
        towards, spread = rng.uniform(0, 2 * np.pi), rng.uniform(0.07, 0.18)
        offset = np.angle(np.exp(1j * (angle - towards)))
        spicules = spicules + rng.uniform(0.15, 0.6) * radius * np.exp(-((offset / spread) ** 2))
    return angle, distance, radius, spicules


def insonify(tissue: Tissue, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Simulate the image of a tissue with speckle, attenuation, focus, noise floor and logarithmic compression.

    Returns:
        uint8 image of the tissue's shape.
    """
    shape = tissue.echogenicity_db.shape
    amplitude = 10.0 ** (tissue.echogenicity_db / 20.0)
    axial_px, lateral_px = rng.uniform(0.6, 0.9), rng.uniform(1.1, 1.9)
    envelope = np.zeros(shape)
    looks = int(rng.integers(1, 4))
    for _ in range(looks):
        scatterers = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        field = blur_pulse(scatterers, axial_px, lateral_px)
        field = amplitude * field / np.sqrt(np.mean(np.abs(field) ** 2)) + tissue.specular
        envelope += np.abs(blur_pulse(field, 0.4, 0.6)) / looks
    # beams diverge, so the shadow of an absorbing pixel widens with depth
    loss_db = gaussian_filter1d(np.cumsum(tissue.attenuation_db, axis=0), 2.5, axis=1)
    depth = np.linspace(0.0, 1.0, shape[0])[:, None]
    gain_db = -10.0 * rng.uniform(0.2, 1.0) * (depth - rng.uniform(0.3, 0.6)) ** 2 / 0.25
    noise_floor = 10.0 ** (rng.uniform(-42.0, -34.0) / 20.0)
    received = envelope * 10.0 ** ((gain_db - loss_db) / 20.0)
    received = np.hypot(received, noise_floor * np.abs(rng.standard_normal(shape)))
    dynamic_range_db, white_db = rng.uniform(42.0, 52.0), rng.uniform(8.0, 15.0)
    grey = 255.0 * (20.0 * np.log10(received + 1e-6) - white_db + dynamic_range_db) / dynamic_range_db
    return np.clip(np.round(grey), 0, 255).astype(np.uint8)


def blur_pulse(field: NDArray, axial_px: float, lateral_px: float) -> NDArray:
    """Return a complex field blurred by the pulse, a Gaussian with these standard deviations (pixels)."""
    sigma = (axial_px, lateral_px)
    return gaussian_filter(field.real, sigma) + 1j * gaussian_filter(field.imag, sigma)


def write_dataset(folder: Path, training: int = 60, test: int = 20, seed: int = 2026) -> None:
    """Write the demo dataset in nnU-Net's raw format, as 8-bit PNG; dataset.json is written last.

    Args:
        folder: folder of the dataset, such as nnUNet_raw/Dataset901_DemoUltrasound; created if it is missing.
        training: number of images in imagesTr and labelsTr.
        test: number of images in imagesTs, with ground truth in labelsTs.
        seed: seed of the whole dataset.
    """
    import SimpleITK

    for part, count, first_seed in (("Tr", training, 0), ("Ts", test, 100_000)):
        images, labels = folder / f"images{part}", folder / f"labels{part}"
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            made = generate_image(KIND_CYCLE[number % len(KIND_CYCLE)], seed * 1_000_000 + first_seed + number)
            name = f"{made.kind}_{number:03d}"
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(made.image), str(images / f"{name}_0000.png"))
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(made.mask), str(labels / f"{name}.png"))
    description = {
        "name": "DemoUltrasound",
        "description": "Procedurally generated images that resemble breast ultrasound; no patient data",
        "channel_names": {"0": "ultrasound"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": training,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
