"""Wheel and sdist hold the package and nothing else at top level, and the wheel works where the sources are not."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
FOREIGN_FILES = ("tests/", "demo/", "documentation/", ".venv/")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with one wheel and one sdist, built from a copy of what git would see."""
    pytest.importorskip("build", reason="pip install build")
    output = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--outdir", str(output), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode and "Could not find a version" in done.stdout + done.stderr:
        pytest.skip("no package index within reach for the isolated build")
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("nnunet_diffusion-*.whl")
    return found


def sources() -> set[str]:
    """Modules as a wheel must name them."""
    inside = {str(path.relative_to(ROOT)) for path in (ROOT / "nnunet_diffusion").rglob("*.py")}
    for folder in ("trainers", "planners"):
        inside |= {f"nnunet_diffusion/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    return inside


def test_wheel_holds_every_module_and_nothing_else_at_top_level(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {name for name in names if ".dist-info/" not in name}
    assert code == sources()
    assert "nnunet_diffusion/trainers/DiffusionTrainer.py" in code
    assert {name.split("/")[0] for name in code} == {"nnunet_diffusion"}


def test_wheel_carries_licence_and_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    assert any(name.endswith("/LICENSE") for name in names)
    metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    for line in (
        "Name: nnunet-diffusion",
        "Version: 0.1.0",
        "Requires-Python: >=3.10",
        "Requires-Dist: nnunetv2>=2.8.0",
    ):
        assert line in metadata
    assert "Apache-2.0" in metadata
    assert "Provides-Extra: solvers" in metadata and "Provides-Extra: dev" in metadata


def test_sdist_holds_the_sources_and_no_tests(built):
    (sdist,) = built.glob("nnunet_diffusion-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "LICENSE", "trainers/DiffusionTrainer.py", "planners/__init__.py"} <= names
    assert not [name for name in names if name.startswith(FOREIGN_FILES)]


def test_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    """The environment sees no checkout and only this package; the modules that need nothing else must import."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "fresh")], check=True)
    python = tmp_path / "fresh" / "bin" / "python"
    words = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(words, check=True, cwd=tmp_path)
    done = subprocess.run(
        [str(python.parent / "nnunet_diffusion"), "trainers_directory"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_relative_to(tmp_path / "fresh") and (folder / "DiffusionTrainer.py").is_file()
    code = (
        "import importlib.util as u; import nnunet_diffusion.planners; "
        "print([name for name in ('trainers', 'planners', 'tests') if u.find_spec(name)])"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
