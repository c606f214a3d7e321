"""Which labels are wrong: scores, evidence, a report, exports and a cleaned dataset.

From the records of a run come an estimate of its noise (`estimate`), a table with a row per sample (`table`), pictures
for the report (`evidence`), files for other tools (`export`) and a cleaned dataset (`cleaning`). `single_pass` makes
records from any classifier.

A name is imported when it is first used: the server of `review` starts without torch.
"""

import importlib


MODULES = {
    "audit_run": "run",
    "clean_dataset": "cleaning",
    "escape_formula": "export",
    "export_audit": "export",
    "find_label_issues": "issues",
    "judge_labels": "judge",
    "load_audit": "table",
    "noise_scores": "table",
    "load_annotations": "cleaning",
    "score_model": "single_pass",
}

__all__ = sorted(MODULES)


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
