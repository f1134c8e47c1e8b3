"""Images that a reading library accepts, or refuses in its own words, and images whose header asks for too much memory."""

from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

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


@pytest.mark.parametrize("edge", [np.nan, np.inf])
def test_spacing_that_is_no_number_is_refused(tmp_path, edge):
    with pytest.raises(ValueError, match=f"a.nii has a spacing of {edge:g} x 1 x 1 mm: correct its header"):
        check_nifti(saved(tmp_path / "a.nii", spacing=(edge, 1, 1)))


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
    with pytest.raises(MemoryError, match="a.nii.gz has 6 x 5 x 4 voxels, which need"):
        check_nifti(path)


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
