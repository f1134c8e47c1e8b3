"""Which network classes plans may name.

Plans may come from untrusted sources, and the classes that they name are imported and called.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import dynamic_network_architectures.architectures
from torch import nn

NETWORK_PACKAGES = "nnUNet_diffusion_network_packages"
"""Environment variable: further packages whose networks plans may name, separated by commas."""
OFFERED = "dynamic_network_architectures"
TRUST = "give --trust_checkpoint (trust_checkpoint=True)"
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextlib.contextmanager
def trusting(wanted: bool = True) -> Iterator[None]:
    """Allow any class name in plans inside a `with` block if `wanted`; the user takes responsibility."""
    token = _trusted.set(wanted or _trusted.get())
    try:
        yield
    finally:
        _trusted.reset(token)


def network_class(name: object) -> type[nn.Module] | None:
    """Return the class that plans name, or None if it is not one that they may name.

    Allowed are the modules of `torch.nn`, the networks and blocks of `dynamic_network_architectures`, and those of the
    packages in `nnUNet_diffusion_network_packages`. The check imports nothing outside these packages.

    Args:
        name: dotted name, as in nnU-Net's plans. As in nnU-Net, an architecture that has moved is found by the last part.
    """
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        return None
    folder, _, last = name.rpartition(".")
    if folder == "torch.nn" or folder.startswith("torch.nn.modules"):
        # torch has imported all of these modules; a name that passes through other attributes is not among them
        return _module_class(getattr(sys.modules.get(folder), last, None), "torch.nn.modules")
    for package in (OFFERED, *_packages_of_the_user()):
        if name.startswith(f"{package}."):
            found = getattr(_module(folder, package), last, None)
            return _moved(last) if found is None and package == OFFERED else _module_class(found, package)
    return None


def refuse_unknown_classes(architecture: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if an architecture names a class that plans may not name.

    nnU-Net imports the classes named by `network_class_name` and by the arguments listed in `_kw_requires_import`, and calls
    them with arguments from the plans. The denoiser does the same with `conv_op`.

    Args:
        architecture: `architecture` of a configuration of nnU-Net's plans, or `presegmentor_architecture`.
        source: where the plans come from (a file name or a description), for the message.
    """
    if _trusted.get() or not architecture:
        return
    keywords, imported = architecture.get("arch_kwargs", {}), architecture.get("_kw_requires_import", [])
    if not isinstance(keywords, Mapping) or not isinstance(imported, (list, tuple)):
        raise ValueError(
            f"{source}: arch_kwargs must be a dictionary and _kw_requires_import a list, got {keywords!r} and {imported!r}; "
            "take the plans from where the model was trained."
        )
    named = {key: keywords.get(key) for key in sorted({*map(str, imported), "conv_op"})}
    for key, name in {"network_class_name": architecture.get("network_class_name"), **named}.items():
        if name is not None and network_class(name) is None:
            raise ValueError(
                f"{source} names {name!r} as {key}, which is not a network class of torch.nn or {OFFERED}: it is not loaded. "
                f"If you trust this model, export {NETWORK_PACKAGES}=PACKAGE with the package of its network, or {TRUST}."
            )


def _packages_of_the_user() -> list[str]:
    return [each.strip() for each in os.environ.get(NETWORK_PACKAGES, "").split(",") if each.strip()]


def _module(name: str, package: str) -> Any:
    """Return a module of a package; None if it has no such module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise ValueError(f"{name} of the package {package} needs {error.name}: pip install it.") from error


def _module_class(found: Any, package: str) -> type[nn.Module] | None:
    """Return `found` if it is a network class that the package defines itself."""
    own = isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.".startswith(f"{package}.")
    return found if own else None


def _moved(name: str) -> type[nn.Module] | None:
    """Return the class that nnU-Net uses if a module no longer exists: the first of that name in any architecture module."""
    folder = dynamic_network_architectures.architectures
    for module in pkgutil.iter_modules(folder.__path__, f"{folder.__name__}."):
        found = getattr(_module(module.name, OFFERED), name, None)
        if found is not None:
            return _module_class(found, OFFERED)
    return None
