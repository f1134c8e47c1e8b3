"""`nnunet_diffusion doctor`: check whether this machine is ready for training, and print how to correct each problem."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnunet_diffusion.cli.errors import first_line
from nnunet_diffusion.cli.trainers_directory import VARIABLE, search_path, trainers_directory
from nnunet_diffusion.files import says_not_found

OK, WARN, FAIL = "OK", "WARN", "FAIL"
SET_TRAINERS = f'export {VARIABLE}="$(nnunet_diffusion trainers_directory)"'
# package -> oldest supported version
REQUIREMENTS = {"nnunetv2": (2, 8, 0), "torch": (2, 10, 0)}
SMALL_SHARED_MEMORY_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: what was checked.
        level: OK, WARN or FAIL.
        seen: what the check found.
        cure: how to correct it; empty if the level is OK.
    """

    name: str
    level: str
    seen: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.name:<20}  {self.seen}" + (f"; {self.cure}" if self.cure else "")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `doctor` to the command line."""
    parser = subparsers.add_parser("doctor", help="check paths, versions, trainer search and GPU")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print one line per finding. Return exit code 1 if any finding is FAIL, else 0."""
    failures = 0
    for finding in examine(os.environ):
        print(finding, flush=True)
        failures += finding.level == FAIL
    print("ready" if not failures else "1 problem found" if failures == 1 else f"{failures} problems found")
    return int(failures > 0)


def examine(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the findings of all checks. A check that raises an exception counts as FAIL and does not stop the others.

    Args:
        environment: variables of the process, as nnU-Net will read them.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": check_python,
        "packages": check_versions,
        "folders": lambda: check_folders(environment),
        VARIABLE: lambda: check_search_path(environment),
        "torchvision": check_torchvision,
        "trainer": check_trainer,
        "device": check_device,
        "/dev/shm": check_shared_memory,
        "diffusers": check_solvers,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # a broken installation may raise anything; the other checks still help
            seen = f"this check stopped with {type(error).__name__}: {first_line(error)}"
            yield Finding(name, FAIL, seen, "install this package again, in its clone: pip install --force-reinstall .")


def check_python() -> Iterator[Finding]:
    """Check that Python is new enough."""
    seen = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) < (3, 10):
        yield Finding("python", FAIL, seen, "install Python 3.10 or newer and create the environment with it")
    else:
        yield Finding("python", OK, seen)


def check_versions() -> Iterator[Finding]:
    """Check that the packages this plugin needs are installed in a supported version."""
    for package, oldest in REQUIREMENTS.items():
        wanted = f'"{package}>={".".join(map(str, oldest))}"'
        try:
            seen = version(package)
        except PackageNotFoundError:
            yield Finding(package, FAIL, "not installed", f"pip install {wanted}")
            continue
        numbers = tuple(int(number) for number in re.findall(r"\d+", seen.split("+")[0])[:3])
        if numbers < oldest:
            yield Finding(package, FAIL, f"{seen} is not supported", f"pip install --upgrade {wanted}")
        else:
            yield Finding(package, OK, seen)


def check_folders(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check that nnU-Net's three folders are set, exist and are writable; raw data are often shared and may be read-only."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = environment.get(name)
        if not folder:
            yield Finding(name, FAIL, "not set", f"export {name}=/path/to/{name}")
        elif not Path(folder).is_dir():
            yield Finding(name, FAIL, f"{folder} is not a folder", f"mkdir -p '{folder}', or correct the variable")
        elif not is_writable(Path(folder)):
            level, cure = FAIL, f"chmod u+w '{folder}', or choose another folder"
            if name == "nnUNet_raw":
                level, cure = WARN, "nothing to do, unless you want to put datasets there"
            yield Finding(name, level, f"{folder} cannot be written", cure)
        else:
            free_gigabytes = shutil.disk_usage(folder).free / 1e9
            yield Finding(name, OK, f"{folder} ({free_gigabytes:.0f} GB free)")


def is_writable(folder: Path) -> bool:
    """Return True if a temporary file can be created in `folder`; permission bits are unreliable on network drives."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_search_path(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check that `nnUNet_extTrainer` includes our trainers' folder and that every folder in it exists."""
    folders = search_path(environment)
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    ours = trainers_directory()
    if not folders:
        yield Finding(VARIABLE, FAIL, "not set", SET_TRAINERS)
    elif ours not in [Path(folder).resolve() for folder in folders]:
        cure = f'export {VARIABLE}="$(nnunet_diffusion trainers_directory){os.pathsep}${VARIABLE}"'
        yield Finding(VARIABLE, FAIL, f"{os.pathsep.join(folders)} does not include {ours}", cure)
    elif missing:
        yield Finding(VARIABLE, WARN, f"not a folder: {', '.join(missing)}", "remove it from the variable")
    else:
        yield Finding(VARIABLE, OK, os.pathsep.join(folders))


def check_torchvision() -> Iterator[Finding]:
    """Check that torch and torchvision come from the same build, by running one compiled operator."""
    torch = importlib.import_module("torch")
    cure = "install both from one index: pip install --upgrade --force-reinstall torch torchvision"
    try:
        operators = importlib.import_module("torchvision.ops")
        operators.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    except Exception as error:  # ImportError, RuntimeError or AttributeError, depending on the two versions
        yield Finding("torchvision", FAIL, f"does not work with torch {torch.__version__} ({first_line(error)})", cure)
    else:
        yield Finding("torchvision", OK, f"{version('torchvision')} matches torch {torch.__version__}")


def check_trainer() -> Iterator[Finding]:
    """Check that nnU-Net's own search, which nnUNetv2_train and nnUNetv2_predict use, finds DiffusionTrainer."""
    name = "DiffusionTrainer"
    finder = importlib.import_module("nnunetv2.utilities.find_objects")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = finder.recursive_find_trainer_class_by_name(name)
    except Exception as error:  # any trainer file in a folder of the variable may raise anything
        if says_not_found(error):
            yield Finding("trainer", FAIL, f"nnU-Net does not find {name}", SET_TRAINERS)
            return
        seen = f"the search stopped with {type(error).__name__}: {first_line(error)}"
        cure = f"first correct any FAIL above; otherwise correct that file, or remove its folder from {VARIABLE}"
        yield Finding("trainer", FAIL, seen, cure)
    else:
        yield Finding("trainer", OK, f"{found.__name__} found by nnU-Net")


def check_device() -> Iterator[Finding]:
    """Check that there is a GPU and that it supports bfloat16. Without a GPU everything works, but slowly."""
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        yield Finding("GPU", OK, f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
        precision = importlib.import_module("nnunet_diffusion.model.precision")  # the check that training uses
        if precision.has_bfloat16(torch.device("cuda")):
            yield Finding("bfloat16", OK, "supported")
        else:
            yield Finding("bfloat16", WARN, "not supported", "training uses float16 instead; nothing to do")
    elif shutil.which("nvidia-smi"):
        cure = "install the torch build for your CUDA version (https://pytorch.org/get-started/locally/)"
        yield Finding("GPU", WARN, f"nvidia-smi is installed, but torch {torch.__version__} finds no GPU", cure)
    elif torch.backends.mps.is_available():
        yield Finding(
            "GPU", WARN, "Apple MPS, on which this package has not been tested", "use -device cpu, or try -device mps"
        )
    else:
        yield Finding("GPU", WARN, "none", "plan, train and predict with -device cpu; large datasets need a CUDA GPU")


def check_shared_memory() -> Iterator[Finding]:
    """Check the size of /dev/shm, through which background workers pass batches; it is small in many containers."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Finding("/dev/shm", OK, "not used on this system")
        return
    size = shutil.disk_usage(folder).total
    seen = f"{size / 2**30:.1f} GiB"
    if size < SMALL_SHARED_MEMORY_BYTES:
        yield Finding(
            "/dev/shm", WARN, seen, "start the container with --shm-size=8g, or train with nnUNet_n_proc_DA=0"
        )
    else:
        yield Finding("/dev/shm", OK, seen)


def check_solvers() -> Iterator[Finding]:
    """Check for diffusers, the optional package that the solvers dpm_solver, dpm_solver++ and unipc need."""
    try:
        yield Finding("diffusers", OK, version("diffusers"))
    except PackageNotFoundError:
        cure = "to use them: pip install diffusers"
        yield Finding("diffusers", WARN, "not installed; needed for dpm_solver, dpm_solver++ and unipc only", cure)
