"""Images that a reading library accepts, or refuses in its own words, and images whose header asks for too much memory."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_diffusion.inference import reading
from nnunet_diffusion.inference.reading import check_nifti, check_size, constant_channels, nonzero_shape, read_images

pytestmark = pytest.mark.nnunet
SHAPE = (6, 5, 4)


def saved(path, voxels=None, spacing=(1, 1, 1)):
    """Write a NIfTI file whose header says so, whatever it is."""
    voxels = np.random.default_rng(0).random(SHAPE).astype(np.float32) if voxels is None else voxels
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header["pixdim"][1:4] = spacing
    nibabel.save(image, path)
    return str(path)


def test_good_image_is_read_as_nnunet_reads_it(tmp_path):
    path = saved(tmp_path / "a_0000.nii.gz", spacing=(1, 2, 3))
    image, properties = read_images([path], SimpleITKIO())
    expected, theirs = SimpleITKIO().read_images([path])
    assert np.array_equal(image, expected) and properties["spacing"] == theirs["spacing"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nan_that_itk_reads_as_zero_is_refused(tmp_path, value, ending):
    voxels = np.ones(SHAPE, np.float32)
    voxels[1, 2, 3] = value
    path = saved(tmp_path / f"a_0000{ending}", voxels)
    with pytest.raises(ValueError, match="a_0000.* has NaN or infinite voxels: replace them"):
        read_images([path], SimpleITKIO())


@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_file_that_is_cut_off_is_refused_where_itk_reads_zeros(tmp_path, kind):
    path = tmp_path / "a_0000.nii.gz"
    saved(path, (np.random.default_rng(0).random((40, 40, 40)) * 1000).astype(kind))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert np.any(SimpleITKIO().read_images([str(path)])[0])  # no error
    with pytest.raises(ValueError, match="a_0000.nii.gz is damaged or cut off: Compressed file ended"):
        read_images([str(path)], SimpleITKIO())


def test_integers_are_not_read_where_only_nan_is_looked_for(tmp_path):
    path = tmp_path / "a.nii.gz"
    saved(path, np.arange(64000, dtype=np.int32).reshape(40, 40, 40))
    path.write_bytes(path.read_bytes()[:2000])
    check_nifti(path, whole=False)
    with pytest.raises(ValueError, match="cut off"):
        check_nifti(path)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x1f\x8b\x08\x00broken"])
@pytest.mark.parametrize(
    ("ending", "reader"), [(".nii.gz", SimpleITKIO), (".png", NaturalImage2DIO), (".nrrd", SimpleITKIO)]
)
def test_other_content_is_one_line_that_names_the_file(tmp_path, content, ending, reader):
    path = tmp_path / f"a_0000{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a_0000{ending}.*(damaged|cannot be read)") as error:
        read_images([str(path)], reader())
    assert "\n" not in str(error.value) and ".cxx" not in str(error.value)


@pytest.mark.parametrize("edge", [np.nan, np.inf, 0, -1])
@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_spacing_that_is_no_length_is_refused_where_itk_reads_another(tmp_path, edge, reader):
    path = saved(tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[80:84] = np.float32(edge).tobytes()  # pixdim[1]; nibabel writes no such header
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.nii has a spacing of {edge:g} x 1 x 1 mm: correct its header"):
        read_images([path], reader())


def test_one_slice_needs_no_spacing(tmp_path):
    path = saved(tmp_path / "a.nii", np.ones((5, 4, 1), np.float32), spacing=(1, 1, 0))
    assert read_images([path], SimpleITKIO())[0].shape == (1, 1, 4, 5)


@pytest.mark.parametrize("spacing", [[0, 1, 1], ["a", 1, 1], [float("nan"), 1, 1]])
def test_spacing_of_tiff_is_whatever_its_json_file_holds(tmp_path, spacing):
    tifffile.imwrite(tmp_path / "a_0000.tif", np.ones(SHAPE, np.float32))
    (tmp_path / "a.json").write_text(json.dumps({"spacing": spacing}))
    with pytest.raises(ValueError, match=f"a_0000.tif has a spacing of {spacing[0]} x 1 x 1 mm"):
        read_images([str(tmp_path / "a_0000.tif")], Tiff3DIO())
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="a_0000.tif cannot be read: it lacks 'spacing'"):
        read_images([str(tmp_path / "a_0000.tif")], Tiff3DIO())


def test_colour_complex_and_numbers_of_axes_that_itk_reads_otherwise_are_refused(tmp_path):
    def refused(voxels, reason, vector=False, ending=".mha"):
        path = str(tmp_path / f"a{ending}")
        sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=vector), path)
        with pytest.raises(ValueError, match=rf"a{ending} {reason}"):
            read_images([path], SimpleITKIO())

    refused(np.ones((6, 5, 3), np.float32), "has 3 values in each voxel", vector=True)
    refused(np.ones((6, 5, 4, 3), np.float32), "has 3 values in each voxel", vector=True)
    refused(np.ones(SHAPE, np.complex64), "has complex numbers", ending=".nii.gz")
    refused(np.ones((2, 2, *SHAPE), np.float32), "has 5 axes", ending=".nii.gz")
    path = saved(tmp_path / "b.nii.gz", np.ones(5, np.float32), spacing=(1, 1, 1))
    with pytest.raises(ValueError, match=r"b.nii.gz has 1 axes, but must have two or three"):
        read_images([path], SimpleITKIO())
    with pytest.raises(ValueError, match=r"b.nii.gz has 1 axes, but must have three"):
        read_images([path], NibabelIO())


def test_channels_that_differ_are_named_with_both_values(tmp_path):
    first = saved(tmp_path / "a_0000.nii.gz")
    for voxels, spacing, reason in (
        (np.ones((6, 5, 3), np.float32), (1, 1, 1), "has shape 1 x 3 x 5 x 6, but .*a_0000.nii.gz has 1 x 4 x 5 x 6"),
        (None, (1, 1, 2), "has spacing 2 x 1 x 1, but .*a_0000.nii.gz has 1 x 1 x 1: resample"),
    ):
        other = saved(tmp_path / "a_0001.nii.gz", voxels, spacing)
        with pytest.raises(ValueError, match=f"a_0001.nii.gz {reason}"):
            read_images([first, other], SimpleITKIO())
    with pytest.raises(FileNotFoundError, match="the case has no image"):
        read_images([], SimpleITKIO())


def test_folders_and_missing_files_are_told_apart(tmp_path):
    (tmp_path / "a.nii.gz").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder, not a file"):
        read_images([str(tmp_path / "a.nii.gz")], SimpleITKIO())
    with pytest.raises(FileNotFoundError, match="b.nii.gz is missing"):
        read_images([str(tmp_path / "b.nii.gz")], SimpleITKIO())


def size_of(image, spacing, target=(1.0, 1.0, 1.0), order=(0, 1, 2)):
    plans, configuration = SimpleNamespace(transpose_forward=list(order)), SimpleNamespace(spacing=list(target))
    check_size("a.nii.gz", image, spacing, plans, configuration, 3)


def test_image_whose_header_makes_it_huge_is_refused_before_it_is_resampled():
    image = np.ones((1, 4, 60, 50), np.float32)
    with pytest.raises(
        MemoryError, match=r"a.nii.gz, resampled from 1000 x 1000 x 1000 mm.*4000 x 60000 x 50000 voxels"
    ):
        size_of(image, (1000, 1000, 1000))
    with pytest.raises(MemoryError, match=r"4 x 60000 x 50000 voxels"):  # in 2d slices stay
        size_of(image, (1000, 1000, 1000), target=(1.0, 1.0))
    with pytest.raises(MemoryError, match=r"from 2 x 1 x 1e\+06 mm.*100 x 4 x 60000000 voxels"):
        size_of(image, (1, 1000000, 2), order=(2, 0, 1))


def test_only_what_nnunet_keeps_after_cropping_counts(monkeypatch):
    image = np.zeros((2, 100, 100, 100), np.float32)
    monkeypatch.setattr(reading, "free_bytes", lambda device: 200e6)
    with pytest.raises(MemoryError, match="200 x 200 x 200"):
        size_of(image + 1, (2, 2, 2))
    image[0, 3:5, 10, 10], image[1, 3, 10:20, 7] = 1, 1
    assert nonzero_shape(image) == [2, 10, 4]
    size_of(image, (2, 2, 2))


def test_memory_of_the_image_itself_is_counted_before_its_voxels_are_read(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.nii.gz")
    monkeypatch.setattr(reading, "free_bytes", lambda device: 100.0)
    monkeypatch.setattr(SimpleITKIO, "read_images", lambda *_: pytest.fail("the voxels are read"))
    for limit in (None, 1000):
        with pytest.raises(MemoryError, match="a.nii.gz has 4 x 5 x 6 voxels, which need"):
            read_images([path], SimpleITKIO(), limit)


def test_image_of_less_than_a_voxel_and_of_two_axes_are_refused():
    with pytest.raises(ValueError, match=r"4 x 60 x 50 voxels.*from 0.001 x 0.001 x 0.001 mm.* leaves none"):
        size_of(np.ones((1, 4, 60, 50), np.float32), (0.001, 0.001, 0.001))
    with pytest.raises(ValueError, match="has two axes"):
        size_of(np.ones((1, 1, 60, 50), np.float32), (999, 1, 1))
    size_of(np.ones((1, 1, 60, 50), np.float32), (999, 1, 1), target=(1.0, 1.0))


def test_constant_channels_are_told():
    image = np.stack([np.full((3, 3), 7.0), np.arange(9.0).reshape(3, 3)])
    assert constant_channels(["a_0000.png", "a_0001.png"], image) == [
        "WARNING: all voxels of a_0000.png have the value 7, so there is nothing to see in it"
    ]
