"""Write a corrected dataset from the scores of a run and the decisions of people, in the format of the original.

    python scripts/clean.py outputs/photos --how relabel --threshold 0.9 --output_dir cleaned --dry_run
    python scripts/clean.py outputs/photos --annotations anna.csv bo.csv --how drop --output_dir cleaned
    python scripts/clean.py outputs/photos --output_format csv --output_dir cleaned

Annotations go before scores; without --annotations those of `hnml review` count. Where two people disagree, the
label stays as it is, and the sample is listed in `disagreements.csv`. `lineage.csv` in the output accounts for every
row, and tells the next audit what people have decided.
"""

import argparse
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

from options import HelpFormatter, load_data, plain_errors, saved_data_arguments

from hnml_hf import load_audit
from hnml_hf.audit.cleaning import HOW, plan_cleaning
from hnml_hf.audit.outputs import (
    FILES,
    FORMATS,
    LISTED,
    Source,
    check_output,
    describe_plan,
    read_source,
    write_csv,
    write_dataset,
    write_folder,
)
from hnml_hf.audit.review import Merged, merge_annotations, read_annotations
from hnml_hf.audit.review.lineage import gone_before, lineage_of_rows
from hnml_hf.audit.review.log import LOG_FILE
from hnml_hf.audit.table import likely_classes
from hnml_hf.common.atomic import new_folder
from hnml_hf.common.words import counted


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("run", help="`output_dir` of a run that was audited.")
    parser.add_argument("--annotations", nargs="+", default=[], help="CSV files of the report, or annotation logs.")
    parser.add_argument(
        "--how", choices=HOW, help="What to do with labels that are probably wrong and were not reviewed."
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="Score from which a label counts as wrong.")
    parser.add_argument("--output_dir", required=True, help="New folder for the corrected dataset.")
    parser.add_argument("--output_format", choices=FORMATS, help="Default: the format of the original.")
    parser.add_argument("--files", choices=FILES, default="copy", help="How images get into a new folder.")
    parser.add_argument("--add_classes", nargs="+", default=[], help="Classes that annotations may add.")
    parser.add_argument("--dry_run", action="store_true", help="Print what would change, and write nothing.")
    return parser.parse_args(argv)


def gather_annotations(paths: list[str], run: str, table) -> Merged | None:
    """Annotations of some files, else of the run's own log."""
    own = Path(run, "_audit", LOG_FILE)
    paths = paths or ([own] if own.is_file() else [])
    return merge_annotations([read_annotations(path, table) for path in paths]) if paths else None


def report_agreement(merged: Merged):
    for (first, second), (kappa, count) in merged.kappa.items():
        if count:
            print(f"Agreement of {first} and {second}: Cohen's kappa {kappa:.2f} on {counted(count, 'sample')}")
    if len(merged.disagreements):
        print(f"They disagree on {counted(len(merged.disagreements), 'sample')}, where nothing changes:")
        for index, row in merged.disagreements.head(10).iterrows():
            print(f"  {index}: " + ", ".join(f"{who}: {said}" for who, said in row.items() if said))


def write_output(options, form: str, source: Source, plan, data, table, folder: Path) -> Counter:
    gone = gone_before(options.run)
    if form == "folder":
        return write_folder(plan, source, folder, files=options.files, gone=gone)
    if form == "csv":
        return write_csv(plan, source, folder, gone=gone)
    return write_dataset(plan, data, table, folder, parquet=form == "parquet", gone=gone)


@plain_errors()
def main(argv: list[str] | None = None):
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    with nullcontext() if options.dry_run else new_folder(options.output_dir) as folder:
        actions = clean(options, folder)
    if options.dry_run:
        print(f"Nothing was written; without --dry_run {options.output_dir} would be.")
    else:
        print(f"{options.output_dir}: " + ", ".join(f"{count:,} {name}" for name, count in sorted(actions.items())))


def clean(options, folder: Path | None) -> Counter:
    """Say what changes and write it into a folder, if there is one; the number of rows of each action."""
    table = load_audit(options.run)
    source = read_source(options.run)
    form = options.output_format or source.format
    merged = gather_annotations(options.annotations, options.run, table)
    plan = plan_cleaning(
        table,
        annotations=None if merged is None else merged.annotations,
        how=options.how,
        threshold=options.threshold,
        add_classes=options.add_classes,
        earlier=lineage_of_rows(options.run, table["index"].tolist(), table["path"].tolist()),
    )
    data = load_data(saved_data_arguments(options.run)) if form in ("parquet", "arrow") else None
    check_output(plan, source, form, options.output_dir, data=data, table=table)
    if merged is not None:
        report_agreement(merged)
    print("\n".join(describe_plan(plan)))
    unread = table[table["given_probability"].isna()]
    if len(unread):
        names = [str(path or index) for path, index in zip(unread["path"], unread["index"], strict=True)][:LISTED]
        print(
            f"{counted(len(unread), 'row', 'were')} not judged, and nothing changes there: {', '.join(names)}"
            f"{' and others' if len(unread) > len(names) else ''}. `hnml check` says which images cannot be read."
        )
    if options.how == "posterior" and likely_classes(table) is None:
        print("This audit has not kept the likeliest classes: targets are the given and the suggested class alone.")
    if folder is None:
        return Counter()
    actions = write_output(options, form, source, plan, data, table, folder)
    if form == "csv":
        print(f"The images stay where they are: with the new table give `--data_dir {source.images_root(plan)}`.")
    if merged is not None and len(merged.disagreements):
        merged.disagreements.to_csv(folder / "disagreements.csv")
    return actions


if __name__ == "__main__":
    main()
