"""Find the label errors of a dataset: a score for every label, a report with pictures, exports.

    python scripts/audit.py photos                        # a folder of classes, a table, a known dataset, a Hub id
    accelerate launch --multi_gpu --num_processes 2 scripts/audit.py photos  # each sees its share of the images
    python scripts/audit.py photos --annotations a.csv    # again, with what people have decided; features are kept
    python scripts/audit.py outputs/quickstart            # a finished run: scored from what training saw, no new pass
    python scripts/audit.py --model timm/resnet50.a1_in1k --dataset imagefolder --data_dir photos --output_dir out
    python scripts/audit.py outputs/quickstart --export csv cleanlab fiftyone datumaro
    python scripts/clean.py outputs/photos --how relabel --output_dir photos_cleaned  # then, a corrected copy

A dataset is judged without training: one forward pass of a pretrained backbone, then a classifier in closed form that
is never asked about a label it has seen. Features are kept in `--cache_dir`, so that a pass that was stopped goes on.
`--model` is a folder or a Hub id of a timm or transformers image classifier; it sees every image once. A run is loaded
with the options of its dataset, each of which can be given anew, as `--data_dir` of one that was moved; a dataset that
has changed since is refused.
"""

import argparse
import json
import logging
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from datasets import Dataset, DatasetDict
from options import (
    DataArguments,
    data_name,
    load_data,
    parse_all,
    plain_errors,
    save_data_arguments,
    saved_data_arguments,
    unusable,
)
from review import CLASSIFIER_FOLDER
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

from hnml_hf import (
    TimmCAMForImageClassification,
    audit_run,
    check_dataset,
    create_image_processor,
    create_transforms,
    export_audit,
    load_audit,
    score_model,
)
from hnml_hf.audit.dynamics import dynamics_file, judge_dynamics, run_dynamics
from hnml_hf.audit.export import FORMATS
from hnml_hf.audit.features import (
    FEATURES_FOLDER,
    Features,
    FrozenBackbone,
    extract_features,
    features_beside,
    launched,
    load_backbone,
)
from hnml_hf.audit.findings import FINDINGS, findings
from hnml_hf.audit.issues import dataset_table, judge_classifier, judge_features, worst_pairs
from hnml_hf.audit.judge import Judgement, check_labels
from hnml_hf.audit.leaks import find_leaks
from hnml_hf.audit.review import follow_annotations, merge_annotations, read_all
from hnml_hf.audit.review.annotations import unknown_classes
from hnml_hf.audit.review.lineage import decided_before
from hnml_hf.audit.review.matching import Scored, describe_lost
from hnml_hf.audit.run import write_report
from hnml_hf.audit.table import changed_rows
from hnml_hf.cli import MOVED, HelpFormatter, answer_help, refuse_too_little
from hnml_hf.common.devices import usable_device
from hnml_hf.common.words import counted
from hnml_hf.data.checks import format_report, save_report
from hnml_hf.data.schema import column, image_paths, labels_fingerprint
from hnml_hf.training.resume.files import run_lock


@dataclass
class AuditArguments:
    _argument_group_name = "audit"

    backbone: str = field(
        default="tf_efficientnet_lite0.in1k", metadata={"help": "A timm model, whose features judge a dataset."}
    )
    pretrained: str = field(
        default="true", metadata={"help": "`true` for timm's weights from the Hub, or a safetensors file or folder."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the input in pixels; default: the backbone's."}
    )
    num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read images; default: the cores, less one, at most 8."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where features are kept; default: `_features` in `output_dir`."}
    )
    check: bool = field(
        default=False, metadata={"help": "Check files and rows first, as `hnml check` does, and list what is wrong."}
    )
    compare_splits: list[str] = field(
        default_factory=list,
        metadata={"help": "Other splits, as `test`: list the training images that are copies of one of theirs."},
    )
    annotations: list[str] = field(
        default_factory=list,
        metadata={"help": "Annotations of an earlier audit in `output_dir`, which the judge learns from."},
    )
    run: str | None = field(default=None, metadata={"help": "`output_dir` of a training run that has finished."})
    model: str | None = field(default=None, metadata={"help": "Instead: folder or Hub id of an image classifier."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Gets `_audit/`; default: the run, or `outputs/` and the name of the data."}
    )
    max_issues: int = field(default=2000, metadata={"help": "Label issues that the report shows, at most."})
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Images in a forward pass, fewer where memory runs out; default: by size and device."},
    )
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})
    export: list[str] = field(
        default_factory=list,
        metadata={"help": "Files for other tools: csv, cleanlab, fiftyone, datumaro, label_studio, cvat."},
    )


OF_THE_JUDGE = ("backbone", "pretrained", "image_size", "num_workers", "cache_dir")


def parse_arguments(argv: list[str]) -> tuple[AuditArguments, DataArguments]:
    answer_help("audit", argv)
    parser = HfArgumentParser(
        (AuditArguments, DataArguments),
        formatter_class=HelpFormatter,
        usage="%(prog)s DATA_OR_RUN [options]",
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="?", help="Dataset, as `--dataset`, or folder of a finished training run.")
    audit_args, data_args, (target,) = parse_target(parser, argv)
    if target is not None and is_run(target) and not audit_args.model:
        if audit_args.run not in (None, target):
            parser.error(f"{target} and --run {audit_args.run} are two runs; give one of them")
        argv = [*argv, "--run", target]
    elif target is not None:
        if data_args.dataset is not None:
            parser.error(f"{target} and --dataset {data_args.dataset} are two datasets; give one of them")
        refuse_audited(parser, target)
        argv = [*argv, "--dataset", target]
    audit_args, data_args, _ = parse_target(parser, argv)
    if audit_args.run and audit_args.model:
        parser.error("give --run (a finished training run) or --model (any classifier), one of them")
    refuse_too_little(parser, "audit", argparse.Namespace(**vars(audit_args), **vars(data_args)))
    refuse_values(parser, audit_args)
    if audit_args.run or audit_args.model:
        scored = "a training run" if audit_args.run else "--model"
        for option in fields(AuditArguments):
            if option.name in OF_THE_JUDGE and getattr(audit_args, option.name) != option.default:
                parser.error(f"--{option.name} is for the judge of a dataset; {scored} is scored by its own network")
    if audit_args.run and audit_args.check:
        parser.error("--check is of a dataset; a run has read all of its images")
    if audit_args.compare_splits and (audit_args.run or audit_args.model):
        parser.error("--compare_splits takes the features of a dataset that is judged without training")
    if audit_args.annotations and (audit_args.run or audit_args.model):
        parser.error("--annotations are for the judge of a dataset; `hnml clean` applies those of any audit")
    if audit_args.model and not (data_args.dataset and audit_args.output_dir):
        parser.error("--model needs --dataset and --output_dir")
    if audit_args.run:
        saved = Path(audit_args.run, "_audit", "dataset.json")
        run_dynamics(audit_args.run)  # the clearer error, if this is no run
        if saved.is_file():
            parser.set_defaults(**asdict(saved_data_arguments(audit_args.run)))
            audit_args, data_args, _ = parse_target(parser, argv)
        elif data_args.dataset is None:
            parser.error(f"{saved} is missing, so it is not known what the run was trained on; give --dataset")
    place = Path("outputs", data_name(data_args.dataset, data_args.data_dir))
    audit_args.output_dir = audit_args.output_dir or audit_args.run or str(place)
    return audit_args, data_args


def refuse_values(parser: HfArgumentParser, given: AuditArguments):
    """End with one line if an option has a value with which the audit would fail after the forward pass."""
    for name, least in {"image_size": 1, "batch_size": 1, "num_workers": 0, "max_issues": 0}.items():
        value = getattr(given, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}; given {value}")
    for unknown in sorted(set(given.export) - set(FORMATS)):
        parser.error(f"--export {unknown} is none of {', '.join(FORMATS)}")
    if problem := unusable(given.device):
        parser.error(problem)


def parse_target(parser: HfArgumentParser, argv: list[str]) -> tuple[AuditArguments, DataArguments, tuple[str | None]]:
    """The options, and the dataset or run that comes without the name of an option."""
    audit_args, data_args, rest = parse_all(parser, argv, MOVED["audit"])
    return audit_args, data_args, (rest.data,)


def refuse_audited(parser: HfArgumentParser, target: str):
    """End with one line if the folder is not of data, but what an audit of other data has written."""
    if not Path(target, "_audit", "dataset.json").is_file():
        return
    options = saved_data_arguments(target)
    sources = [place for place in (options.data_dir, options.dataset) if place]
    if os.path.realpath(target) not in map(os.path.realpath, sources):
        parser.error(f"{target} holds an audit of {sources[0]}; give these data, and --output_dir {target}")


def is_run(folder: str) -> bool:
    return dynamics_file(folder).is_file()


def check_run(run: str, data_args: DataArguments, rows: Dataset):
    """Refuse rows that a run was not trained on: an audit of other data may lie in its folder.

    Raises:
        ValueError: naming run and data, and what to do.
    """
    records = run_dynamics(run)
    changed = changed_rows(records["index"], records["label"], rows)
    if changed:
        source = " in ".join(filter(None, (data_args.dataset, data_args.data_dir)))
        raise ValueError(
            f"{run} is a training run of {counted(len(records), 'row')}, and {source} has "
            f"{counted(len(rows), 'row')} that are not the same ({changed}). Give `--dataset` and its options as they "
            f"were in training; without them those of the last audit that was written there count "
            f"({Path(run, '_audit', 'dataset.json')})."
        )


def load_frozen(audit_args: AuditArguments) -> FrozenBackbone:
    """The backbone of a dataset's judge, before anything is read that takes long: its weights may be missing."""
    given = audit_args.pretrained
    pretrained = {"true": True, "false": False}.get(given.lower(), given)
    return load_backbone(audit_args.backbone, pretrained=pretrained, image_size=audit_args.image_size)


def checkset(audit_args: AuditArguments, data_args: DataArguments, data: DatasetDict, backbone: FrozenBackbone):
    """One forward pass of a frozen backbone and the judge of its features: the table, and the folder of the judge as a
    model, in the first process."""
    started = time.perf_counter()
    state = launched()
    compared = compared_splits(audit_args, data)
    annotations = decisions(audit_args, data_args, data["train"])
    if annotations is None:  # what people have decided may tell of classes that have one sample
        check_labels(column(data["train"], "label"), column=data_args.label_column)
    facts = {}
    if audit_args.check and state.is_main_process:
        facts["check"] = check(data, audit_args.output_dir, max_pixels=data_args.max_pixels)
    cache = audit_args.cache_dir or Path(audit_args.output_dir, FEATURES_FOLDER)
    beside = [] if audit_args.cache_dir else features_beside(audit_args.output_dir)
    how = {"batch_size": audit_args.batch_size, "num_workers": audit_args.num_workers, "device": audit_args.device}
    how |= {"max_pixels": data_args.max_pixels}
    features = extract_features(data["train"], backbone, cache_dir=cache, also_in=beside, **how)
    others = {}
    for split, rows in compared.items():  # in a folder of its own, since one of as many rows would be overwritten
        known = [cache, *beside, *(place / split for place in beside)]
        others[split] = rows, extract_features(rows, backbone, cache_dir=Path(cache, split), also_in=known, **how)
    if not state.is_main_process:
        return None, None
    passed = time.perf_counter()
    size = backbone.config.pretrained_cfg["input_size"][-1]
    judgement = judge_features(data["train"], features, annotations=annotations, device=audit_args.device)
    if others:
        leaks = find_leaks(data["train"], features, others, judgement.projection)
        facts["leaks"] = {split: int((leaks["other_split"] == split).sum()) for split in others}
    table = dataset_table(
        data["train"],
        features,
        judgement,
        annotations=annotations,
        source=data_args.dataset,
        provenance=f"{audit_args.backbone} at {size} pixels, frozen; shrinkage discriminants in 5-fold "
        "cross-validation. No label was judged by a classifier that had seen it. The range is no confidence interval.",
        **facts,
    )
    judged = time.perf_counter()
    save_data_arguments(audit_args.output_dir, data_args)
    found = findings(table)
    if others:
        found["leaks"] = leaks
    how = {"max_issues": audit_args.max_issues, "max_pixels": data_args.max_pixels}
    write_report(audit_args.output_dir, table, data["train"], found=found, **how)
    reported = time.perf_counter()
    classifier = save_classifier(audit_args, data["train"], features, judgement, backbone, annotations)
    saved = time.perf_counter()
    passes = [features, *(seen for _, seen in others.values())]
    waiting, forward = (sum(part.seconds[what] for part in passes) for what in ("waiting", "forward"))
    computed = sum(part.computed for part in passes)
    unreadable = int((~features.readable).sum())
    print(f"Rows: {len(table):,}" + (f" ({counted(unreadable, 'image')} cannot be read)" if unreadable else ""))
    print(f"Most common label errors:{_pairs(table)}")
    for split, (rows, seen) in others.items():
        missing = int((~seen.readable).sum())
        said = f" ({counted(missing, 'image')} cannot be read)" if missing else ""
        print(f"Compared with {split}: {counted(len(rows), 'image')}{said}")
    for kind, listed in found.items():
        if len(listed):
            where = Path(audit_args.output_dir, "_audit", f"{kind}.jsonl")
            print(f"Also {FINDINGS[kind]}: {len(listed):,}, see {where}")
    print(
        f"Seconds: {waiting:.0f} waiting for images, {forward:.0f} in the backbone "
        f"({counted(computed, 'image')}; {features.values.nbytes / 1e6:,.0f} MB of features in "
        f"{features.folder}), "
        f"{judged - passed:.0f} judging, {reported - judged:.0f} for the report, {saved - reported:.0f} for the "
        f"classifier, {saved - started:.0f} in all"
    )
    return table, classifier


def save_classifier(
    audit_args: AuditArguments,
    rows: Dataset,
    features: Features,
    judgement: Judgement,
    backbone: FrozenBackbone,
    annotations: pd.DataFrame | None,
) -> Path | None:
    """Leave the judge as an ordinary model, which predicts, and shows `hnml review` where it looked; None if it cannot
    be one."""
    folder = Path(audit_args.output_dir, CLASSIFIER_FOLDER)
    try:
        model = judge_classifier(
            rows, features, judgement, backbone, annotations=annotations, device=audit_args.device
        )
        model.save_pretrained(folder)
        create_image_processor(model.config.pretrained_cfg).save_pretrained(folder)
    except (ValueError, OSError) as error:  # some backbones end in more than a linear layer; a disk may be full
        print(f"No classifier is saved: {error}")
        return None
    return folder


def compared_splits(audit_args: AuditArguments, data: DatasetDict) -> dict[str, Dataset]:
    """The splits whose images the training images are compared with, by name.

    Raises:
        ValueError: if the dataset has no such split.
    """
    there, wanted = [split for split in data if split != "train"], list(dict.fromkeys(audit_args.compare_splits))
    unknown = [split for split in wanted if split not in there]
    if unknown:
        raise ValueError(
            f"`--compare_splits {' '.join(unknown)}`: besides `train`, which is compared, the dataset has "
            + (f"the splits {', '.join(there)}." if there else "no split. `--splits` says where one lies.")
        )
    return {split: data[split] for split in wanted}


def decisions(audit_args: AuditArguments, data_args: DataArguments, rows: Dataset):
    """What people have decided of labels, by sample id: in earlier rounds of a dataset that was cleaned, and in the
    annotations of an earlier audit, which go first; None without."""
    names, order = rows.features["label"].names, np.argsort(rows["index"], kind="stable")
    index, labels = (np.asarray(rows[name])[order] for name in ("index", "label"))
    samples = index.tolist(), image_paths(rows), [names[label] for label in labels]
    earlier = decided_before(asdict(data_args), *samples)
    if not audit_args.annotations:
        return earlier
    try:
        before = load_audit(audit_args.output_dir)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--annotations are of the audit in --output_dir, and {audit_args.output_dir} has none: give the folder "
            "of the audit that people have reviewed, or leave --annotations out."
        ) from error
    said = merge_annotations(read_all(audit_args.annotations, before)).annotations
    same = before.attrs["dataset_fingerprint"] == labels_fingerprint(index, labels, len(names))
    if not same or list(map(os.path.basename, before["path"])) != list(map(os.path.basename, samples[1])):
        said, lost = follow_annotations(said, before, Scored(*samples))
        if lost:
            print(describe_lost(" ".join(audit_args.annotations), lost))
    if unknown := unknown_classes(said.loc[said["annotation"] == "wrong", "new_label_name"], names):
        print(f"Annotations name classes that the dataset does not have, and teach nothing: {unknown}.")
    return said if earlier is None else pd.concat([said, earlier[~earlier.index.isin(said.index)]])


def check(data: DatasetDict, output_dir: str, *, max_pixels: int) -> dict:
    """What is wrong with files and rows, printed and written to `_audit/check.json`; the counts of it."""
    report = check_dataset(data, max_pixels=max_pixels)
    print(format_report(report))
    path = Path(output_dir, "_audit", "check.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_report(path, report)
    return {kind: len(rows) for kind, rows in report["defects"].items() if rows}


def _pairs(table) -> str:
    pairs = worst_pairs(table)
    lines = [f"\n  labeled {given}, probably {suggested}: about {number:,.0f}" for given, suggested, number in pairs]
    return "".join(lines) or " none"


def load_classifier(name: str, device: torch.device):
    """The model, its evaluation transform, how this crops images, and whether it gives maps."""
    config = AutoConfig.from_pretrained(name)
    if config.model_type == "timm_wrapper":
        model = TimmCAMForImageClassification.from_pretrained(name).eval().to(device)
        _, transform = create_transforms(model.config.pretrained_cfg, augmentation="none")
        data = model.config.pretrained_cfg
        crop = {"crop_pct": data.get("crop_pct", 0.875), "crop_mode": data.get("crop_mode", "center")}
        return model, transform, crop, True
    model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(name)
    return model, lambda image: processor(image, return_tensors="pt")["pixel_values"][0], {}, False


def report_facts(audit_args: AuditArguments) -> dict:
    """What an earlier audit of the run says of it, and the curves of the run."""
    state = Path(audit_args.run, "trainer_state.json")
    curves = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.is_file() else []
    try:
        before = load_audit(audit_args.run).attrs
    except FileNotFoundError:
        before = {}
    return {"curves": curves, "provenance": before.get("provenance", "Scored from the statistics of a training run.")}


def audit_classifier(audit_args: AuditArguments, data_args: DataArguments, dataset, device: torch.device):
    """The table of a run from what training saw, or of any classifier from one forward pass."""
    model, transform, crop, has_maps = load_classifier(audit_args.run or audit_args.model, device)
    batch_size = audit_args.batch_size or 64
    if audit_args.run:
        records, facts = run_dynamics(audit_args.run), report_facts(audit_args)
    else:
        facts = {
            "provenance": f"One forward pass of {audit_args.model}. Labels that it was trained on may be memorized."
        }
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        records = score_model(
            dataset,
            lambda pixels: model(pixel_values=pixels.to(device)).logits,
            transform,
            names,
            batch_size=batch_size,
            max_pixels=data_args.max_pixels,
        )
    table = audit_run(
        audit_args.output_dir,
        records,
        dataset,
        transform=transform,
        model=model if has_maps else None,
        cross_validated=judge_dynamics(audit_args.run) if audit_args.run else None,
        **crop,
        max_issues=audit_args.max_issues,
        batch_size=batch_size,
        max_pixels=data_args.max_pixels,
        source=data_args.dataset,
        **facts,
    )
    save_data_arguments(audit_args.output_dir, data_args)
    return table


@plain_errors()
def main(argv: list[str] | None = None):
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    audit_args, data_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    with ExitStack() as held:
        if launched().is_main_process:
            held.enter_context(run_lock(audit_args.output_dir))
        audit(audit_args, data_args)


def audit(audit_args: AuditArguments, data_args: DataArguments):
    """Read the data, score every label, and write what was asked for."""
    device = usable_device(audit_args.device)

    backbone = None if audit_args.run or audit_args.model else load_frozen(audit_args)
    with launched().main_process_first():
        data = load_data(data_args)
    dataset = data["train"]
    if audit_args.run:
        check_run(audit_args.run, data_args, dataset)
    if backbone is None:
        table, classifier = audit_classifier(audit_args, data_args, dataset, device), None
    else:
        table, classifier = checkset(audit_args, data_args, data, backbone)
        if table is None:  # the first process goes on alone
            return
    low, high = table.attrs["noise_rate_interval"]
    folder = Path(audit_args.output_dir, "_audit")
    print(
        f"Estimated noise: {table.attrs['noise_rate']:.1%} of {counted(len(table), 'label')} ({low:.1%} to {high:.1%})"
    )
    if table.attrs["caution"]:
        print(f"Warning: {table.attrs['caution']}")
    print(f"Scores: {folder / 'noise_scores.parquet'}\nReport: {folder / 'report.html'}")
    if classifier is not None:
        print(f"Classifier: {classifier}")
    if audit_args.export:
        for path in export_audit(table, dataset, folder / "exports", audit_args.export):
            print(f"Export: {path}")


if __name__ == "__main__":
    main()
