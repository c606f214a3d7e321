"""Who may import whom: data flows one way, and the maths knows neither models nor files."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hnml_hf"

# folder: folders and modules that its files may import, besides those of the folder itself
ALLOWED = {
    "common": set(),
    "noise": set(),
    "modeling": {"common"},
    "objectives": {"noise"},
    "data": {"common", "noise"},
    "training": {
        "audit.dynamics",
        "audit.noise_model",
        "audit.table",
        "common",
        "data",
        "hub.model_card",
        "hub.upload",
        "objectives",
    },
    "audit": {"common", "data", "modeling"},
    "hub": {"", "common", "data.schema", "modeling"},
    "inference": {"common", "data", "modeling"},
    "cli": set(),
    "__main__": {"", "cli", "common"},
}

# inside a folder, where the order matters: what these modules may import of their own folder
WITHIN = {
    "modeling.cam": set(),
    "modeling.forward": set(),
    "modeling.hub_client": set(),
    "objectives.inner_step": set(),
    "data.schema": set(),
    "data.files": set(),
    "data.decoding": {"data.files"},
    "data.targets": set(),
    "data.transforms": {"data.decoding", "data.splits", "data.targets"},
    "data.resident": {"data.transforms"},
    "data.splits": {"data.schema"},
    "data.collate": {"data.transforms"},
    "data.noise_file": {"data.schema"},
    "audit.dynamics": set(),
    "audit.noise_model": {"audit.dynamics"},
    "audit.table": {"audit.dynamics", "audit.noise_model"},
    "audit.findings": set(),
    "audit.report": {"audit.findings"},
    "hub.upload": set(),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in PACKAGE.rglob("*.py")}


def test_no_two_folders_import_each_other():
    """Directly or around the corner: the folders can be put in an order."""
    graph = {folder: {place.split(".")[0] for place in places} - {""} for folder, places in ALLOWED.items()}
    assert [*TopologicalSorter(graph).static_order()]


def longest_module(target: str) -> str:
    while target and target not in MODULES:
        target = target.rpartition(".")[0]
    return target


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file reaches: by an import, or as an attribute (`hnml_hf.x.y`)."""
    inside = path.relative_to(PACKAGE).parts[:-1] if path.is_relative_to(PACKAGE) else ()
    tree = ast.parse(path.read_text())
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["hnml_hf", *inside[: len(inside) - node.level + 1], *filter(None, [node.module])])
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    found = {name.removeprefix("hnml_hf").removeprefix(".") for name in names if name.split(".")[0] == "hnml_hf"}
    return {longest_module(name) for name in found}


def within(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_follow_the_table(path):
    name = module_name(path)
    if name == "":
        return
    folder = name.split(".")[0]
    reached = imported_modules(path)
    outside = {module for module in reached if module.split(".")[0] != folder}
    assert not [module for module in outside if not within(module, ALLOWED[folder])]
    if name in WITHIN:
        assert reached - outside - {name} <= WITHIN[name]


def test_the_walk_sees_relative_and_absolute_imports_and_attributes(tmp_path):
    assert "objectives.inner_step" in imported_modules(PACKAGE / "objectives" / "virtual_step.py")
    assert "data.schema" in imported_modules(PACKAGE / "data" / "synthetic.py")
    source = tmp_path / "source.py"
    source.write_text("import hnml_hf\n\nhnml_hf.common.atomic.atomic_write('x')\n")
    assert "common.atomic" in imported_modules(source)


def test_the_top_of_the_package_is_one_screen():
    unread = ("__pycache__", "py.typed")  # the second is empty: type checkers look for it
    assert len([path for path in PACKAGE.iterdir() if path.name not in unread]) <= 12


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.name)
def test_scripts_use_no_private_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hnml_hf":
            assert not [alias.name for alias in node.names if alias.name.startswith("_")]
