"""Write a corrected dataset from the scores of a run and the decisions of people, in the format of the original.

    python scripts/clean.py outputs/photos --how relabel --threshold 0.9 --output_dir cleaned --dry_run
    python scripts/clean.py outputs/photos --annotations anna.csv bo.csv --how drop --output_dir cleaned
    python scripts/clean.py outputs/photos --exclude near_duplicates.jsonl --removed_dir removed --output_dir cleaned
    python scripts/clean.py outputs/photos --output_format csv --output_dir cleaned

Annotations go before scores; without --annotations those of `hnml review` count. Where two people disagree, the
label stays as it is, and the sample is listed in `disagreements.csv`. A row that --exclude names is left out, whatever
people have said of its label: delete its line to keep it. What was added since the audit is named, and stays as it is.
`lineage.csv` in the output accounts for every row, and tells the next audit what people have decided.
"""

import argparse
import errno
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from options import HelpFormatter, command_words, load_data, plain_errors, saved_data_arguments

from hnml_hf import load_audit
from hnml_hf.audit.cleaning import HOW, load_excluded, plan_cleaning
from hnml_hf.audit.export import escape_formula
from hnml_hf.audit.outputs import (
    FILES,
    FORMATS,
    Source,
    check_output,
    describe_plan,
    read_source,
    write_csv,
    write_dataset,
    write_folder,
)
from hnml_hf.audit.review import Merged, merge_annotations, read_all
from hnml_hf.audit.review.lineage import DECIDED, DISAGREEMENTS_FILE, gone_before, lineage_of_rows
from hnml_hf.audit.review.log import LOG_FILE
from hnml_hf.audit.table import likely_classes
from hnml_hf.common.atomic import check_new_folder, new_folder
from hnml_hf.common.words import counted


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("run", help="`output_dir` of a run that was audited.")
    parser.add_argument("--annotations", nargs="+", default=[], help="CSV files of the report, or annotation logs.")
    parser.add_argument(
        "--how",
        choices=HOW,
        help="What to do with labels that are probably wrong and were not reviewed: drop, relabel, weight or "
        "posterior; default: nothing.",
    )
    parser.add_argument("--threshold", type=float, help="Score from which a label counts as wrong; default: 0.5.")
    parser.add_argument(
        "--exclude", nargs="+", help="Exclusion lists of `hnml audit` or `hnml check`, whose rows are left out."
    )
    parser.add_argument("--output_dir", required=True, help="New folder for the corrected dataset.")
    parser.add_argument(
        "--output_format", choices=FORMATS, help="folder, csv, parquet or arrow; default: the format of the original."
    )
    parser.add_argument(
        "--files", choices=FILES, help="How images get into a new folder: copy, hardlink or symlink; default: copy."
    )
    parser.add_argument(
        "--removed_dir", help="New folder for images that are dropped or excluded; default: they stay where they are."
    )
    parser.add_argument("--add_classes", nargs="+", default=[], help="Classes that annotations may add.")
    parser.add_argument("--dry_run", action="store_true", help="Print what would change, and write nothing.")
    options = parser.parse_args(argv)
    if options.threshold is not None and options.how not in ("drop", "relabel"):
        parser.error("--threshold is of --how drop and --how relabel; annotations, weight and posterior have none")
    return options


def gather_annotations(paths: list[str], run: str, table) -> Merged | None:
    """Annotations of some files, else of the run's own log."""
    own = Path(run, "_audit", LOG_FILE)
    paths = paths or ([own] if own.is_file() else [])
    return merge_annotations(read_all(paths, table)) if paths else None


def check_nothing_forgotten(table, merged: Merged | None, earlier: Mapping[int, Mapping]):
    """Refuse to clean without annotations that the scores were made with: nobody would know what people have said."""
    if "annotation" not in table:
        return
    known = {index for index, row in earlier.items() if row["annotation"] in DECIDED}
    known |= set() if merged is None else set(merged.annotations.index)
    forgotten = set(table["index"][table["annotation"].isin(DECIDED)]) - known
    if forgotten:
        raise ValueError(
            f"The audit has learned from annotations of {counted(len(forgotten), 'label')} that are not given here: "
            "add those files by --annotations."
        )


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
        with new_folder(options.removed_dir) if options.removed_dir else nullcontext() as removed:
            files = options.files or "copy"
            return write_folder(plan, source, folder, files=files, removed=removed, gone=gone)
    if form == "csv":
        return write_csv(plan, source, folder, gone=gone)
    return write_dataset(plan, data, table, folder, parquet=form == "parquet", gone=gone)


@plain_errors()
def main(argv: list[str] | None = None):
    options = parse_arguments(command_words(argv))
    if options.removed_dir:
        check_new_folder(options.removed_dir)
    if options.dry_run:
        check_new_folder(options.output_dir)
    with nullcontext() if options.dry_run else new_folder(options.output_dir) as folder:
        try:
            actions = clean(options, folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(error.errno, error.strerror, options.output_dir) from error  # not the file that was read
    if options.dry_run:
        print(f"Nothing was written; without --dry_run {options.output_dir} would be.")
    else:
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(actions.items()))
        print(f"{options.output_dir}: {counts.replace('_', ' ')}")


def clean(options, folder: Path | None) -> Counter:
    """Say what changes and write it into a folder, if there is one; the number of rows of each action."""
    table = load_audit(options.run)
    source = read_source(options.run)
    form = options.output_format or source.format
    if options.files and form != "folder":
        raise ValueError(f"--files {options.files} is of --output_format folder; {form} takes no images along.")
    if options.removed_dir and form != "folder":
        raise ValueError(
            f"--removed_dir {options.removed_dir} is of --output_format folder; with {form} no image is moved."
        )
    merged = gather_annotations(options.annotations, options.run, table)
    earlier = lineage_of_rows(options.run, table["index"].tolist(), table["path"].tolist())
    check_nothing_forgotten(table, merged, earlier)
    excluded = None if options.exclude is None else load_excluded(options.exclude, table, source.excluded)
    plan = plan_cleaning(
        table,
        annotations=None if merged is None else merged.annotations,
        how=options.how,
        threshold=0.5 if options.threshold is None else options.threshold,
        excluded=excluded,
        add_classes=options.add_classes,
        earlier=earlier,
    )
    data = load_data(saved_data_arguments(options.run)) if form in ("parquet", "arrow") else None
    files = options.files or "copy"
    removed = options.removed_dir
    plan = check_output(plan, source, form, options.output_dir, files=files, removed=removed, data=data, table=table)
    if merged is not None:
        report_agreement(merged)
    print("\n".join(describe_plan(plan)))
    if options.how == "posterior" and likely_classes(table) is None:
        print("This audit has not kept the likeliest classes: targets are the given and the suggested class alone.")
    if folder is None:
        return Counter()
    actions = write_output(options, form, source, plan, data, table, folder)
    if form == "csv" and all(plan["path"]):
        print(f"The images stay where they are: with the new table give `--data_dir {source.images_root(plan)}`.")
    if merged is not None and len(merged.disagreements):
        rows = merged.disagreements.map(escape_formula).rename(columns=escape_formula)
        paths = table.set_index("index")["path"].reindex(rows.index).map(escape_formula)
        rows.insert(rows.shape[1], "path", paths, allow_duplicates=True)  # an annotator may be called so
        rows.to_csv(folder / DISAGREEMENTS_FILE)
    return actions


if __name__ == "__main__":
    main()
