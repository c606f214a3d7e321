"""Read every image and label of a dataset before training, and list what is wrong with them.

    python scripts/check.py photos
    python scripts/check.py photos --output check.json --exclude_output excluded.jsonl
    python scripts/check.py photos/train.csv --label_column class

Exit code: 0 clean, 2 defects, 1 the check could not run. The report (`--output`) has one list for each kind of defect;
the exclusion list has the rows that training should leave out.
"""

import argparse
import logging
import os
import re
import sys

from datasets import DatasetDict
from options import add_source_options, command_words, read_dataset, settle_dataset

import hnml_hf
from hnml_hf import check_dataset
from hnml_hf.cli import HelpFormatter
from hnml_hf.common.words import counted


checks = hnml_hf.data.checks
DataError = hnml_hf.data.schema.DataError

CLEAN, COULD_NOT_RUN, DEFECTS = 0, 1, 2

# what else the loader finds wrong with the data begins with the place: `<file>:<line>:` or `<source> row <number>:`
PLACE = re.compile(r"\S.*?(:\d+| row \d+): ")


class Parser(argparse.ArgumentParser):
    """argparse exits with 2 for wrong options, which here means defects."""

    def error(self, message: str):
        self.print_usage(sys.stderr)
        self.exit(COULD_NOT_RUN, f"{self.prog}: error: {message}\n")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    usage = "%(prog)s DATA [options]"
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False, usage=usage)
    parser.add_argument("data", nargs="?", help="A folder of images, a table, a known dataset or a Hub id.")
    add_source_options(parser)
    parser.add_argument("--num_workers", type=int, help="Threads that read and decode; default: number of CPUs.")
    parser.add_argument("--output", help="Write the report here, as JSON.")
    parser.add_argument("--exclude_output", help="Write the rows to leave out here, one JSON object a line.")
    options = parser.parse_args(command_words(argv))
    settle_dataset(parser, options)
    return options


def load(arguments: argparse.Namespace) -> tuple[DatasetDict | None, list[dict]]:
    """The dataset and what the loader found wrong with it.

    The loader stops at the first row without image file or label. The rest is checked without the missing files; an
    unusable label leaves nothing to check.
    """
    problems = []
    for on_missing in ("error", "skip"):
        try:
            return read_dataset(arguments, on_missing=on_missing), problems
        except ValueError as error:
            if not (isinstance(error, DataError) or PLACE.match(str(error))):
                raise
            if {"reason": str(error)} not in problems:
                problems.append({"reason": str(error)})
    return None, problems


def image_folder(arguments: argparse.Namespace) -> str | None:
    """The folder whose image files should all be rows: known for the user's own folders and tables."""
    dataset, data_dir = (path and os.path.expanduser(path) for path in (arguments.dataset, arguments.data_dir))
    if dataset == "imagefolder":
        return data_dir
    if os.path.isdir(dataset):
        return data_dir or dataset
    if os.path.isfile(dataset):
        return data_dir or os.path.dirname(os.path.abspath(dataset))
    return None


def check(arguments: argparse.Namespace) -> int:
    dataset, problems = load(arguments)
    report = checks.empty_report()
    if dataset is not None:
        report = check_dataset(
            dataset,
            num_workers=arguments.num_workers,
            max_pixels=arguments.max_pixels,
            image_dir=image_folder(arguments),
        )
    report["defects"]["loading"] = problems
    report["num_defects"] += len(problems)

    print(checks.format_report(report))
    if arguments.output:
        checks.save_report(arguments.output, report)
    if arguments.exclude_output:
        rows = checks.save_exclusions(arguments.exclude_output, report)
        print(f"\n{counted(rows, 'row')} to leave out, in {arguments.exclude_output}")
    return DEFECTS if report["num_defects"] else CLEAN


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        return check(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"The check could not run: {error}", file=sys.stderr)
        return COULD_NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
