"""The documentation says what the code says: settings, links, places in the code, examples and error messages.

Commands named in it are checked by test_layering.py.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from nnunet_diffusion.model.settings import DiffusionSettings

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nnunet_diffusion"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "documentation").rglob("*.md"))]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def read(name):
    return (ROOT / "documentation" / name).read_text(encoding="utf-8")


def anchors(text):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "documentation" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_reference_is_up_to_date():
    assert read("settings.md") == script("make_settings").text(), "run: python documentation/make_settings.py"


EXPERIMENTS = sorted((ROOT / "documentation" / "experiments").glob("*.md"))


@pytest.mark.parametrize("page", EXPERIMENTS, ids=name_of)
def test_csv_of_an_experiment_is_up_to_date(page):
    made = script("make_csv").text(page.read_text(encoding="utf-8"))
    assert page.with_suffix(".csv").read_text(encoding="utf-8") == made, "run: python documentation/make_csv.py"


def test_results_name_every_experiment():
    assert EXPERIMENTS and all(f"](experiments/{page.name})" in read("results.md") for page in EXPERIMENTS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_exist(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    broken = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        known = anchors(linked.read_text(encoding="utf-8")) if anchor and linked.is_file() else {anchor}
        if not linked.is_relative_to(ROOT) or not linked.exists() or anchor not in known:
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_places_in_the_code_exist(page):
    for file, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text(encoding="utf-8")):
        body = ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
        for part in name.split("."):
            found = [node for node in body if part in names_of(node)]
            assert found, f"{file} has no {name}"
            body = getattr(found[0], "body", [])


def test_files_of_the_map_from_papers_exist():
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## From the papers to the files")[1].split("##")[0]
    )
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    files = re.findall(r"`(\w+/[\w/]*)(\.py)?`", table)
    assert len(files) > 10 and not [f"{name}{end}" for name, end in files if not (PACKAGE / f"{name}{end}").exists()]


def names_of(node):
    if isinstance(node, ast.AnnAssign):
        return [ast.unparse(node.target)]
    return [getattr(node, "name", None)]


def test_examples_of_settings_are_legal():
    network = {"conv_op": "Conv2d", "strides": [[1, 1]] + [[2, 2]] * 5, "kernel_sizes": [[3, 3]] * 6}
    arch = {"network_class_name": "PlainConvUNet", "arch_kwargs": {**network, "features_per_stage": [32] * 6}}
    examples = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", read("quick_start.md"), re.DOTALL)]
    assert examples
    for example in examples:
        section = example["configurations"]["2d"]["diffusion"]
        settings = DiffusionSettings.from_plans({"architecture": arch, "batch_size": 12, "diffusion": section})
        assert len(settings.features_per_stage) == 6
        for owner, values in section.items():
            assert settings.to_plans()[owner].items() >= values.items()


def test_messages_of_the_troubleshooting_table_are_those_of_the_code():
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    texts = [str(node.value) for node in nodes if isinstance(node, ast.Constant)]
    table = read("quick_start.md").split("## Troubleshooting")[1].split("Messages of nnU-Net")[0]
    messages = re.findall(r"^\| `([^`]+)`", table, re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        fragments = [fragment.strip() for fragment in re.split(r"\.{3,}", message) if len(fragment.strip()) > 3]
        assert fragments, message
        missing = [fragment for fragment in fragments if not any(fragment in text for text in texts)]
        assert not missing, f"{message}: the code says nothing like {missing}"


def test_every_trainer_is_in_the_quick_start():
    page, tree = (
        read("quick_start.md"),
        ast.parse((ROOT / "trainers" / "DiffusionTrainer_Xepochs.py").read_text(encoding="utf-8")),
    )
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            assert f"| `{node.name}` | `nnUNetTrainer{node.name.removeprefix('DiffusionTrainer')}` |" in page
