"""Find the wrong labels of a dataset, with evidence: scores, report, exports, and a cleaned dataset.

    python scripts/audit.py --run outputs/quickstart                                  # of a finished run: no new pass
    python scripts/audit.py --model timm/resnet50.a1_in1k --dataset imagefolder --data_dir photos --output_dir out
    python scripts/audit.py --run outputs/quickstart --export csv cleanlab fiftyone datumaro
    python scripts/audit.py --run outputs/quickstart --apply marks.csv --clean relabel --clean_output outputs/cleaned
    python scripts/train.py --dataset outputs/cleaned --backbone resnet50 --output_dir outputs/second

`--model` is a folder or a Hub id of a timm or transformers image classifier; it sees every image once. A run is loaded
with the options of its dataset, each of which can be given anew, as `--data_dir` of one that was moved; a dataset that
has changed since is refused.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from options import DataArguments, load_data, parse_all, plain_errors
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

from hnml_hf import (
    TimmCAMForImageClassification,
    audit_run,
    clean_dataset,
    create_transforms,
    export_audit,
    load_audit,
    probe_records,
    read_marks,
    run_records,
    score_model,
)
from hnml_hf.cli import HelpFormatter, answer_help
from hnml_hf.training.resume.files import run_lock


@dataclass
class AuditArguments:
    _argument_group_name = "audit"

    run: str | None = field(default=None, metadata={"help": "`output_dir` of a training run that has finished."})
    model: str | None = field(default=None, metadata={"help": "Instead: folder or Hub id of an image classifier."})
    output_dir: str | None = field(default=None, metadata={"help": "Gets `_audit/`; default: the run."})
    max_suspects: int = field(default=2000, metadata={"help": "Suspects that the report shows, at most."})
    batch_size: int = field(default=64, metadata={"help": "Images in a forward pass."})
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})
    export: list[str] = field(
        default_factory=list, metadata={"help": "Files for other tools: csv, cleanlab, fiftyone, datumaro."}
    )
    apply: str | None = field(default=None, metadata={"help": "CSV of marks that was downloaded from the report."})
    clean: str | None = field(
        default=None, metadata={"help": "What to do with labels that are probably wrong: drop, relabel or weight."}
    )
    threshold: float = field(default=0.5, metadata={"help": "Score from which a label counts as wrong, in [0, 1]."})
    clean_output: str | None = field(
        default=None, metadata={"help": "Folder for the dataset that --apply or --clean make."}
    )


def parse_arguments(argv: list[str]) -> tuple[AuditArguments, DataArguments]:
    answer_help("audit", argv)
    parser = HfArgumentParser(
        (AuditArguments, DataArguments),
        formatter_class=HelpFormatter,
        usage="%(prog)s (--run FOLDER | --model NAME --dataset DATASET --output_dir FOLDER) [options]",
        allow_abbrev=False,
    )
    audit_args, data_args = parse_all(parser, argv)
    if (audit_args.run is None) == (audit_args.model is None):
        parser.error("give --run (a finished training run) or --model (any classifier), one of them")
    if audit_args.model and not (data_args.dataset and audit_args.output_dir):
        parser.error("--model needs --dataset and --output_dir")
    if (audit_args.apply or audit_args.clean) and not audit_args.clean_output:
        parser.error("--apply and --clean make a dataset: say where with --clean_output")
    if audit_args.clean_output and not (audit_args.apply or audit_args.clean):
        parser.error("--clean_output needs --clean or --apply, which say what becomes of the labels")
    if audit_args.run:
        saved = Path(audit_args.run, "_audit", "dataset.json")
        run_records(audit_args.run)  # the clearer error, if this is no run
        if saved.is_file():
            parser.set_defaults(**asdict(DataArguments(**json.loads(saved.read_text(encoding="utf-8")))))
            audit_args, data_args = parse_all(parser, argv)
        elif data_args.dataset is None:
            parser.error(f"{saved} is missing, so it is not known what the run was trained on; give --dataset")
    audit_args.output_dir = audit_args.output_dir or audit_args.run
    return audit_args, data_args


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


@plain_errors()
def main(argv: list[str] | None = None):
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    audit_args, data_args = parse_arguments(sys.argv[1:] if argv is None else argv)
    with run_lock(audit_args.output_dir):
        audit(audit_args, data_args)


def audit(audit_args: AuditArguments, data_args: DataArguments):
    """Read the data, score every label, and write what was asked for."""
    device = torch.device(audit_args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    records = run_records(audit_args.run) if audit_args.run else None
    dataset = load_data(data_args)["train"]
    model, transform, crop, has_maps = load_classifier(audit_args.run or audit_args.model, device)
    if audit_args.run:
        facts = report_facts(audit_args)
    else:
        facts = {
            "provenance": f"One pass of {audit_args.model}. If it was trained on these labels, it knows them by heart."
        }
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        records = score_model(
            dataset,
            lambda pixels: model(pixel_values=pixels.to(device)).logits,
            transform,
            names,
            batch_size=audit_args.batch_size,
            max_pixels=data_args.max_pixels,
        )
    table = audit_run(
        audit_args.output_dir,
        records,
        dataset,
        transform=transform,
        model=model if has_maps else None,
        cross_validated=probe_records(audit_args.run) if audit_args.run else None,
        **crop,
        max_suspects=audit_args.max_suspects,
        batch_size=audit_args.batch_size,
        max_pixels=data_args.max_pixels,
        source=data_args.dataset,
        **facts,
    )
    low, high = table.attrs["noise_rate_interval"]
    folder = Path(audit_args.output_dir, "_audit")
    print(f"Estimated noise: {table.attrs['noise_rate']:.1%} of {len(table):,} labels ({low:.1%} to {high:.1%})")
    print(f"Scores: {folder / 'noise_scores.parquet'}\nReport: {folder / 'report.html'}")
    if audit_args.export:
        for path in export_audit(table, dataset, folder / "exports", audit_args.export):
            print(f"Export: {path}")
    if audit_args.apply or audit_args.clean:
        marks = read_marks(audit_args.apply, table) if audit_args.apply else None
        cleaned = clean_dataset(dataset, table, how=audit_args.clean, threshold=audit_args.threshold, marks=marks)
        cleaned.save_to_disk(audit_args.clean_output)
        changed = sum(a != b for a, b in zip(cleaned["label"], cleaned["original_label"], strict=True))
        print(f"Cleaned: {len(cleaned):,} of {len(dataset):,} rows, {changed:,} relabelled: {audit_args.clean_output}")


if __name__ == "__main__":
    main()
