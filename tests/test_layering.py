"""Rules of the architecture, read from the sources: who may import whom, and what every file must have."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "nnunet_diffusion"
PAGE = ROOT / "documentation" / "architecture.md"


def rooms() -> dict[str, tuple[int, set[str]]]:
    """Rooms of the page: name -> layer, and the files and folders that it lists (none: all that are there)."""
    found: dict[str, tuple[int, set[str]]] = {}
    tree = re.search(r"```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    for line in tree.splitlines()[1:] if tree.startswith(PACKAGE) else []:
        if room := re.match(r" *([\w.]+)/? +LAYER (\d)", line):
            name = room[1].removesuffix(".py")
            found[name] = int(room[2]), set()
        else:
            found[name][1].update(line.split())
    return found


ROOMS = rooms()
LAYERS = {name: layer for name, (layer, _) in ROOMS.items()}
# Beside the standard library and its own subpackage, each part of layer 1 imports only these.
FOREIGN = {
    "diffusion": {"torch"},
    "networks": {"torch", "dynamic_network_architectures"},
    "files": set(),
    "jobs": set(),
}
FOREIGN_INSIDE_FUNCTIONS = {"diffusion": {"diffusers"}}
SOURCES = sorted(path for part in (PACKAGE, "trainers", "planners") for path in (ROOT / part).rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "documentation").rglob("*.md"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] != PACKAGE else parts[1]


def imports(tree: ast.AST, inside_functions: bool = True) -> set[str]:
    """Dotted names that a source imports; `from a import b` counts as a.b, because b may be a module."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}: write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found |= imports(node, inside_functions)
    return found


def own_parts(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.") and name.split(".")[1] in LAYERS}


def foreign(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {PACKAGE}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_page_and_the_tree_agree():
    there = {path.stem for path in (ROOT / PACKAGE).iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert there | {"trainers", "planners"} == set(ROOMS)
    for name, (_, listed) in ROOMS.items():
        if listed:
            inside = {path for path in (ROOT / PACKAGE / name).iterdir() if not path.name.startswith("__")}
            assert {path.name + "/" * path.is_dir() for path in inside} == listed, name


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_down(path):
    part = part_of(path)
    if part == "__init__":
        assert not own_parts(imports(tree_of(path)))
        return
    assert part in LAYERS, f"give {part} its layer in {Path(__file__).name}"
    upwards = {other for other in own_parts(imports(tree_of(path))) if LAYERS[other] > LAYERS[part]}
    assert not upwards, f"{name_of(path)} (layer {LAYERS[part]}) imports upwards: {sorted(upwards)}"


@pytest.mark.parametrize("path", [p for p in SOURCES if LAYERS.get(part_of(p), 4) <= 2], ids=name_of)
def test_layers_1_and_2_do_not_import_nnunet(path):
    assert "nnunetv2" not in foreign(imports(tree_of(path)))


@pytest.mark.parametrize("path", [p for p in SOURCES if part_of(p) in FOREIGN], ids=name_of)
def test_layer_1_imports_its_own_subpackage_and_torch_only(path):
    part = part_of(path)
    everywhere, at_top = imports(tree_of(path)), imports(tree_of(path), inside_functions=False)
    assert own_parts(everywhere) <= {part}
    assert foreign(at_top) <= FOREIGN[part]
    assert foreign(everywhere) <= FOREIGN[part] | FOREIGN_INSIDE_FUNCTIONS.get(part, set())


def test_diffusion_and_networks_meet_in_the_model_only():
    both = {part_of(path) for path in SOURCES if {"diffusion", "networks"} <= own_parts(imports(tree_of(path)))}
    assert both == {"model"}


TRAINER_FILES = [path for path in SOURCES if part_of(path) in ("trainers", "planners") and path.stem != "__init__"]


@pytest.mark.parametrize("path", TRAINER_FILES, ids=name_of)
def test_trainer_file_imports_what_is_always_there(path):
    """nnU-Net imports every file of the folder when it looks for one trainer, so none may fail or import another."""
    names = imports(tree_of(path))
    assert own_parts(names) <= {"training", "planning"}
    assert foreign(names) <= {"nnunetv2", "torch"}


@pytest.mark.parametrize("path", [p for p in TRAINER_FILES if part_of(p) == "trainers"], ids=name_of)
def test_trainer_file_is_named_after_a_class_in_it(path):
    """As in nnU-Net, `_Xepochs` in a file's name stands for the number of epochs of each class in it."""
    tree = tree_of(path)
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    classes |= {name.split(".")[-1] for name in imports(tree)}
    pattern = re.escape(path.stem).replace("Xepochs", r"\d+epochs?")
    assert any(re.fullmatch(pattern, name) for name in classes), f"{path.name} holds {sorted(classes)}"


def undocumented(node: ast.AST, prefix: str = "") -> list[str]:
    missing = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
            name = f"{prefix}{child.name}"
            overload = any("setter" in ast.unparse(decorator) for decorator in child.decorator_list)
            if ast.get_docstring(child) is None and not overload:
                missing.append(name)
            if isinstance(child, ast.ClassDef):
                missing += undocumented(child, f"{name}.")
    return missing


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_things_have_docstrings(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    assert not undocumented(tree)


def commands_in(text: str, pattern: str) -> set[str]:
    """Matches of `pattern` at the start of a command, in fenced code and in `inline code`."""
    code = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL) + re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return {match for part in code for match in re.findall(rf"(?:^|[\s;&|($]){pattern}", part, re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_of_the_documentation_exist(path):
    from nnunet_diffusion.cli.main import SUBCOMMANDS

    text = path.read_text(encoding="utf-8")
    subcommands = {module.__name__.split(".")[-1] for module in SUBCOMMANDS}
    assert commands_in(text, r"nnunet_diffusion ([a-z_]+)") <= subcommands
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert commands_in(text, r"make ([a-z]+)") <= targets
    scripts = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}
    assert commands_in(text, r"(nnUNetv2_\w+)") <= scripts


def test_setup_py_does_nothing_when_imported():
    """The trainer search imports every file of a folder, and users give it the repository's root by mistake."""
    body = tree_of(ROOT / "setup.py").body
    calls = [node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not calls
    assert any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in body)
