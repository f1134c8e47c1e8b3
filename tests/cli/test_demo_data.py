"""The generated ultrasound: deterministic, of the promised sizes, with speckle, shadow and enhancement."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.ndimage import label

from nnunet_diffusion.cli.demo_data import (
    KINDS,
    Tissue,
    generate_image,
    insonify,
    layered_tissue,
    write_dataset,
)


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_mask(kind):
    made = generate_image(kind, seed=3)
    assert made.image.dtype == np.uint8 and made.mask.dtype == np.uint8
    assert made.image.shape == made.mask.shape
    assert 144 <= made.image.shape[0] <= 192 and 160 <= made.image.shape[1] <= 192
    assert made.image.std() > 15, "no contrast"
    assert set(np.unique(made.mask)) == ({0} if kind == "normal" else {0, 1})


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_image_other_seed_other_image(kind):
    first, again, other = (generate_image(kind, seed).image for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert first.shape != other.shape or (first != other).any()


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="cyst, benign, malignant, normal"):
        generate_image("lymphoma", 0)


@pytest.mark.parametrize("kind", ["cyst", "benign", "malignant"])
def test_lesions_are_single_darker_and_of_a_sensible_size(kind):
    inside_is_darker = 0
    for seed in range(20):
        made = generate_image(kind, seed)
        assert label(made.mask)[1] == 1
        assert 0.003 < made.mask.mean() < 0.25
        rows = made.mask.any(axis=1)  # the same depths, so that attenuation does not count
        beside = made.image[rows][made.mask[rows] == 0].mean()
        inside_is_darker += made.image[made.mask == 1].mean() < beside
    assert inside_is_darker >= 18


def below_against_beside(kind: str, seed: int) -> float:
    """Grey value under the lesion minus that at the same depths elsewhere."""
    made = generate_image(kind, seed)
    rows, columns = np.nonzero(made.mask)
    first, last = rows.max() + 4, min(rows.max() + 24, made.mask.shape[0])
    under = np.zeros(made.mask.shape[1], dtype=bool)
    under[int(np.percentile(columns, 30)) : int(np.percentile(columns, 70))] = True
    strip = made.image[first:last].astype(float)
    return strip[:, under].mean() - strip[:, ~under].mean() if first < last else np.nan


def test_enhancement_below_cysts_and_shadow_below_malignant_lesions():
    cysts = np.nanmean([below_against_beside("cyst", seed) for seed in range(20)])
    malignant = np.nanmean([below_against_beside("malignant", seed) for seed in range(20)])
    assert cysts > 15
    assert malignant < -8


def test_speckle_has_its_spread_and_a_finite_correlation():
    """In dB a Rayleigh envelope deviates by 5.57, averaged looks by less; 42 to 52 dB are 255 grey values."""
    uniform = Tissue(*np.zeros((3, 160, 160)))
    for seed in range(8):
        grey = insonify(uniform, np.random.default_rng(seed))[40:90].astype(float)
        grey -= grey.mean(axis=1, keepdims=True)  # the gain depends on depth
        assert 0.3 * 5.57 * 255 / 52 < grey.std() < 1.05 * 5.57 * 255 / 42
        assert np.corrcoef(grey[:, :-1].ravel(), grey[:, 1:].ravel())[0, 1] > 0.4
        assert abs(np.corrcoef(grey[:, :-12].ravel(), grey[:, 12:].ravel())[0, 1]) < 0.1


def test_layers_lie_in_order():
    """Gland is brighter than the fat above it and the muscle below it."""
    tissue = layered_tissue((180, 180), np.random.default_rng(0))
    mean = tissue.echogenicity_db.mean(axis=1)
    assert mean[90] > mean[16] and mean[90] > mean[175]
    assert mean[0] > mean[16], "skin is bright"


def test_dataset_is_in_nnunet_format(tmp_path):
    folder = tmp_path / "Dataset901_DemoUltrasound"
    write_dataset(folder, training=7, test=2)
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 7 and description["labels"] == {"background": 0, "lesion": 1}
    for part, count in (("Tr", 7), ("Ts", 2)):
        images = sorted(path.name for path in (folder / f"images{part}").glob("*.png"))
        labels = sorted(path.name for path in (folder / f"labels{part}").glob("*.png"))
        assert len(images) == count
        assert images == [name.replace(".png", "_0000.png") for name in labels]
    assert {name.split("_")[0] for name in labels} <= set(KINDS)
