"""Maps of numbers: where they lie in the image, and what a file of each of nnU-Net's formats keeps of them."""

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image

from nnunet_diffusion.inference.maps import map_ending, to_image, writer_of

SHAPE = (4, 5, 6)
OBLIQUE = (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, -1.0)
FLIPPED = (0.0, -1.0, 0.0, 0.0, 0.0, -1.0, 1.0, 0.0, 0.0)


def written_image(path, direction, shape=SHAPE):
    image = sitk.GetImageFromArray(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    if len(shape) == 3:
        image.SetSpacing((0.5, 1.5, 3.0))
        image.SetOrigin((10.0, -20.0, 30.0))
        image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return image


@pytest.mark.parametrize("direction", [OBLIQUE, FLIPPED])
@pytest.mark.parametrize(
    ("reader", "ending"),
    [
        (SimpleITKIO, ".nii.gz"),
        (SimpleITKIO, ".nrrd"),
        (SimpleITKIO, ".mha"),
        (SimpleITKIOWithReorient, ".nii.gz"),
        (NibabelIO, ".nii.gz"),
        (NibabelIOWithReorient, ".nii.gz"),
    ],
)
def test_map_of_the_images_own_values_is_the_image(tmp_path, reader, ending, direction):
    """What the reader gives of an image, written as a map, is the file of the image again."""
    image = written_image(tmp_path / f"a_0000{ending}", direction)
    voxels, properties = reader().read_images([str(tmp_path / f"a_0000{ending}")])
    path = tmp_path / f"a_entropy{map_ending(ending)}"
    writer_of(reader)(voxels[0] / 7, path, properties)
    found = sitk.ReadImage(str(path))
    assert found.GetPixelID() == sitk.sitkFloat32
    for key in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(found, key)() == pytest.approx(getattr(image, key)(), abs=1e-5), key
    np.testing.assert_allclose(sitk.GetArrayFromImage(found), sitk.GetArrayFromImage(image) / 7, rtol=1e-6)


@pytest.mark.parametrize("ending", [".gipl", ".nii", ".tif"])
def test_other_formats_keep_floats(tmp_path, ending):
    written_image(tmp_path / f"a_0000{ending}", np.eye(3).ravel().tolist())
    voxels, properties = SimpleITKIO().read_images([str(tmp_path / f"a_0000{ending}")])
    writer_of(SimpleITKIO)(voxels[0] / 7, tmp_path / f"a{ending}", properties)
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"a{ending}")))
    np.testing.assert_allclose(found, voxels[0] / 7, rtol=1e-6)


@pytest.mark.parametrize(
    ("reader", "ending"), [(NaturalImage2DIO, ".png"), (SimpleITKIO, ".nrrd"), (SimpleITKIO, ".png")]
)
def test_map_of_an_image_with_two_axes_has_two(tmp_path, reader, ending):
    picture = np.random.default_rng(0).integers(0, 255, (5, 3)).astype(np.uint8)
    if ending == ".png":
        Image.fromarray(picture).save(tmp_path / "a_0000.png")
    else:
        sitk.WriteImage(sitk.GetImageFromArray(picture), str(tmp_path / "a_0000.nrrd"))
    voxels, properties = reader().read_images([str(tmp_path / f"a_0000{ending}")])
    path = tmp_path / f"a_entropy{map_ending(ending)}"
    writer_of(reader)(voxels[0] / 7, path, properties)
    assert path.suffix == (".tif" if ending == ".png" else ending)
    found = tifffile.imread(path) if path.suffix == ".tif" else sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    assert found.shape == (5, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, picture / 7, rtol=1e-6)
    np.testing.assert_allclose(reader().read_images([str(path)])[0][0], voxels[0] / 7, rtol=1e-6)


def test_map_in_a_tiff_stack_keeps_its_values(tmp_path):
    values = np.random.default_rng(0).random((6, 5, 3), np.float32)
    writer_of(Tiff3DIO)(values, tmp_path / "a.tif", {"spacing": (3.0, 1.0, 1.0)})
    assert np.array_equal(Tiff3DIO().read_images([str(tmp_path / "a.tif")])[0][0], values)


def test_unknown_reader_is_named():
    with pytest.raises(NotImplementedError, match="read with dict, .*known: SimpleITKIO.*leave --uncertainty out"):
        writer_of(dict)


@pytest.mark.parametrize(
    ("ending", "wanted"), [(".nii.gz", ".nii.gz"), (".png", ".tif"), (".bmp", ".tif"), (".tif", ".tif")]
)
def test_formats_without_floats_become_tif(ending, wanted):
    assert map_ending(ending) == wanted


def preprocessed(managers_of, spacing, network_spacing, order, **keywords):
    """Plans, configuration, and the properties of an image of (8, 10, 12) voxels that is cropped and transposed."""
    plans, _, description = managers_of(spacing=network_spacing, classes=2, **keywords)
    back = [order.index(axis) for axis in range(3)]
    plans = PlansManager({**plans.plans, "transpose_forward": order, "transpose_backward": back})
    configuration = plans.get_configuration("one")
    image = [(8, 10, 12)[axis] for axis in order]
    box = [[1, edge - 2] for edge in image]
    properties = {
        "spacing": spacing,
        "shape_before_cropping": tuple(image),
        "bbox_used_for_cropping": box,
        "shape_after_cropping_and_before_resampling": tuple(high - low for low, high in box),
    }
    return plans, configuration, description, properties


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_map_lies_where_nnunet_puts_probabilities(managers_of, order):
    plans, configuration, description, properties = preprocessed(managers_of, (1.0,) * 3, (1.0,) * 3, order)
    shape = properties["shape_after_cropping_and_before_resampling"]
    probability = np.random.default_rng(0).uniform(0.01, 0.99, shape).astype(np.float32)
    logits = np.log(np.stack((1 - probability, probability)))
    label_manager = plans.get_label_manager(description)
    theirs = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, label_manager, properties, True, num_threads_torch=1
    )[1][1]
    found = to_image(probability, 0, properties, plans, configuration)
    assert found.shape == (8, 10, 12) and found.dtype == np.float32
    np.testing.assert_allclose(found, theirs, atol=1e-3)
    outside = to_image(probability, 1, properties, plans, configuration)
    assert (outside != found).sum() == 8 * 10 * 12 - np.prod(shape) and outside.max() == 1


@pytest.mark.parametrize("network_spacing", [(2.0, 2.0, 2.0), (3.0, 1.0, 1.0), (1.0, 1.0)])
def test_interpolation_does_not_leave_the_maps_range(managers_of, network_spacing):
    """Cubic splines overshoot at a step."""
    plans, configuration, _, properties = preprocessed(managers_of, (1.0, 2.0, 2.0), network_spacing, [0, 1, 2])
    configuration.configuration["resampling_fn_probabilities_kwargs"]["order"] = 3
    step = np.broadcast_to(np.array([0.0, 0, 0, 1, 1, 1], np.float32), (4, 5, 6)).copy()
    found = to_image(step, 0.5, properties, plans, configuration)
    inner = found[1:-2, 1:-2, 1:-2]
    assert inner.shape == (5, 7, 9)
    assert inner.min() == 0 and inner.max() == 1
    assert (inner[..., :4] < 0.1).all() and (inner[..., 5:] > 0.9).all()
    assert (found[0] == 0.5).all()
