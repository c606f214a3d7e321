"""Who may import whom: data flows one way, and the maths knows neither models nor files."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hnml_hf"

DATASETS = {f"data.{name}" for name in ("clothing1m", "webvision", "animal10n", "food101n", "quickstart")}
OBJECTIVES = {f"objectives.{name}" for name in ("cross_entropy", "gce", "elr", "mean_teacher", "mlnt", "hnml")}

ALLOWED = {
    "noise.checks": set(),
    "noise.transitions": {"noise.checks"},
    "noise.draws": {"noise.checks", "noise.transitions"},
    "noise.neighbors": {"noise.checks"},
    "noise.instance": {"noise.checks", "noise.draws"},
    "noise": {f"noise.{name}" for name in ("draws", "instance", "neighbors", "transitions")},
    "cam": set(),
    "metrics": set(),
    "memory": set(),
    "monitor": set(),
    "gauge": set(),
    "noise_estimate": {"gauge"},
    "sample_statistics": {"whole_file"},
    "sync": set(),
    "backbones": set(),
    "training_args": set(),
    "batch_view": set(),
    "saved_model": {"hub"},
    "timm_backbone": {"hub", "saved_model"},
    "modeling": {"batch_view", "cam", "saved_model", "timm_backbone"},
    "meta": set(),
    "objectives.cross_entropy": set(),
    "objectives.gce": set(),
    "objectives.elr": {"objectives.cross_entropy"},
    "objectives.mean_teacher": {"objectives.cross_entropy"},
    "objectives.mlnt": {"meta", "noise", "objectives.cross_entropy", "objectives.mean_teacher"},
    "objectives.hnml": {"cam", "objectives.cross_entropy", "objectives.mean_teacher", "objectives.mlnt"},
    "objectives": OBJECTIVES,
    "data.schema": set(),
    "data.files": set(),
    "data.columns": set(),
    "data.collate": {"data.transforms"},
    "data.decoding": set(),
    "data.transforms": {"data.decoding"},
    "data.splits": {"data.schema"},
    "data.manifest": {"data.schema"},
    "data.synthetic": {"data.decoding", "data.manifest", "data.schema", "noise"},
    "data.preflight.images": {"data.decoding"},
    "data.preflight.report": {"data.preflight.images", "whole_file"},
    "data.preflight.quarantine": {"data.preflight.images", "data.preflight.report", "data.schema", "whole_file"},
    "data.preflight.rows": {"data.schema"},
    "data.preflight": {f"data.preflight.{name}" for name in ("images", "quarantine", "report", "rows")}
    | {"data.files", "data.schema"},
    "data.builder": {"data.files", "data.schema"},
    **{name: {"data.builder", "data.files", "data.schema"} for name in DATASETS},
    "data.cifar_files": {"data.builder"},
    "data.cifar_n": {"data.builder", "data.cifar_files", "data.files", "data.schema"},
    "data.labels": {"data.columns", "data.files", "data.schema"},
    "data.tables": {"data.builder", "data.columns", "data.files", "data.splits"},
    "data.own_data": {"data.builder", "data.columns", "data.files", "data.labels", "data.schema"}
    | {"data.splits", "data.tables"},
    "data.generic": {"data.builder", "data.columns", "data.files", "data.labels", "data.own_data", "data.schema"}
    | {"data.splits", "data.tables"},
    "visits": {"gauge", "sample_statistics"},
    "training_data": set(),
    "training_state": {"monitor", "sample_statistics", "training_args"},
    "evaluation": {"sync"},
    "trainer": {
        "evaluation",
        "training_data",
        "training_state",
        "visits",
        "gauge",
        "monitor",
        "noise_estimate",
        "objectives",
        "memory",
        "sample_statistics",
        "meta",
        "sync",
        "training_args",
        "publishing",
        "resumable",
        "cost",
    },
    "whole_file": set(),
    "checkpoint": set(),
    "interrupt": set(),
    "resumable": {"checkpoint", "interrupt"},
    "publishing": {"hub", "model_card"},
    "training_curves": {"whole_file"},
    "model_card": {"data.schema", "training_curves", "whole_file"},
    "hub": set(),
    "inference": {"cam", "data.decoding", "data.transforms"},
    "export": {"cam", "whole_file"},
    "cost": set(),
    "probe": {"data.collate", "sample_statistics"},
    "__main__": set(),
    "report": {"whole_file"},
    "audit.table": {"data.schema", "noise_estimate", "sample_statistics", "whole_file"},
    "audit.evidence": {"audit.table", "cam", "data.decoding", "data.schema", "report"},
    "audit.single_pass": {"audit.evidence", "data.schema", "sample_statistics"},
    "audit.export": {"audit.table"},
    "audit.cleaning": {"audit.table", "data.schema"},
    "audit": {f"audit.{name}" for name in ("cleaning", "evidence", "export", "single_pass", "table")}
    | {"report", "sample_statistics"},
}

MATHS = {"noise", "cam", "objectives", "meta"}  # public too, reached by module


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, whichever way it is written."""
    inside = path.relative_to(PACKAGE).parts[:-1] if path.is_relative_to(PACKAGE) else ()
    known = {module_name(p) for p in PACKAGE.rglob("*.py")}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["hnml_hf", *inside[: len(inside) - node.level + 1], *filter(None, [node.module])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "hnml_hf" or name.startswith("hnml_hf."):
                target = name.removeprefix("hnml_hf").removeprefix(".")
                while target and target not in known:
                    target = target.rpartition(".")[0]
                found.add(target)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_follow_the_table(path):
    name = module_name(path)
    if name == "":
        return
    allowed = {f"data.{p.stem}" for p in (PACKAGE / "data").glob("*.py")} if name == "data" else ALLOWED[name]
    assert imported_modules(path) <= allowed


def test_the_walk_sees_relative_and_absolute_imports():
    assert "meta" in imported_modules(PACKAGE / "objectives" / "mlnt.py")
    assert "data.schema" in imported_modules(PACKAGE / "data" / "synthetic.py")


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_use_the_public_surface(path):
    assert imported_modules(path) <= {""} | MATHS
