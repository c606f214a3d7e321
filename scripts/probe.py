r"""Fit a linear classifier on the frozen features of a pretrained backbone: the baseline.

    python scripts/probe.py photos --backbone resnet50 --pretrained true \
        --validation_fraction 0.1 --output_dir outputs/probe
    python scripts/probe.py --recipe imagenette_noisy --output_dir outputs/probe

Takes the options and recipes of scripts/train.py; those of training have no effect. Writes a model folder,
`all_results.json` and, from a cross-validation of the probe, which labels are probably wrong (`_audit/`), as training
does. Do this before you train a pretrained backbone: where it is as good, stop here.
"""

import json
import logging
import sys
import time
from pathlib import Path

import transformers
from options import DataArguments, ModelArguments, build_model, load_data, parse_arguments, plain_errors
from train import accuracy_estimate, print_table, write_audit

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TransformedDataset,
    collate_images,
    compute_metrics,
    create_image_processor,
    create_transforms,
)
from hnml_hf.audit.dynamics import save_probe_dynamics, save_run_dynamics
from hnml_hf.audit.probe import cross_validate_probe, fit_linear_probe, pooled_features, set_head
from hnml_hf.training.metrics import noise_auroc
from hnml_hf.training.provenance import commit, versions
from hnml_hf.training.resume.files import run_lock


PROBE = "linear probe"  # instead of an objective


@plain_errors()
def main(argv: list[str] | None = None):
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv, "probe")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    if not model_args.pretrained:
        raise SystemExit("A probe needs pretrained features: give --pretrained true or --pretrained FILE.")
    results = Path(args.output_dir, "all_results.json")
    if results.is_file() and json.loads(results.read_text(encoding="utf-8")).get("objective") != PROBE:
        raise SystemExit(f"`{args.output_dir}` holds a training run, which this would overwrite: give --output_dir.")
    with run_lock(args.output_dir):
        run(model_args, data_args, args)


def run(model_args: ModelArguments, data_args: DataArguments, args: HNMLTrainingArguments):
    """Read the data, fit the probe, and write model, results and audit."""
    transformers.set_seed(args.seed)
    data = load_data(data_args)
    if "validation" not in data:
        raise SystemExit("A probe is chosen on held-out labels: give --validation_fraction 0.1.")
    model = build_model(model_args, dict(enumerate(data["train"].features["label"].names))).to(args.device)
    _, transform = create_transforms(model.config.pretrained_cfg)
    sets = {split: TransformedDataset(data[split], transform, max_pixels=data_args.max_pixels) for split in data}

    start = time.perf_counter()
    loading = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
    samples = [pooled_features(model, sets[split], **loading) for split in ("train", "validation")]
    how = {"num_labels": model.config.num_labels, "sample_weights": sets["train"].weights}
    probe = fit_linear_probe(*samples[0], *samples[1], **how)
    set_head(model.classifiers, probe)
    seconds = time.perf_counter() - start
    records = None
    if data_args.audit:
        records = cross_validate_probe(
            *samples[0], sets["train"].index, strength=probe.strength, seed=args.seed, **how
        )

    args.objective, args.eval_teacher, args.load_best_model_at_end = "ce", False, False
    trainer = HNMLTrainer(  # to evaluate and to save as every other run does
        model=model,
        args=args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        data_collator=collate_images,
        compute_metrics=compute_metrics,
        processing_class=create_image_processor(model.config.pretrained_cfg),
    )
    trainer.save_model(_internal_call=True)
    final = "test" if "test" in sets else "validation"
    train_logits = samples[0][0] @ probe.weight.numpy().T + probe.bias.numpy()
    metrics = {
        "dataset": Path(data_args.dataset).name,
        "objective": PROBE,
        "seed": args.seed,
        "num_processes": args.world_size,
        "commit": commit(),
        "versions": versions(),
        "probe_strength": probe.strength,
        "validation_accuracy": probe.accuracies[probe.strength],
        "validation_accuracies": {f"{strength:g}": accuracy for strength, accuracy in probe.accuracies.items()},
        "train_runtime": round(seconds, 2),
        **trainer.evaluate(sets[final]),
        "eval_split": final,
        "train_noise_auroc": noise_auroc(train_logits, sets["train"].labels, sets["train"].clean_labels),
    }
    metrics["eval_accuracy_last"] = metrics["eval_accuracy"]
    trainer.save_metrics("all", metrics, combined=False)
    if records is not None:
        save_probe_dynamics(args.output_dir, None)
        save_run_dynamics(args.output_dir, records)
        table = write_audit(
            model,
            data_args,
            data["train"],
            transform,
            records,
            output_dir=args.output_dir,
            provenance=f"{model.config.architecture}, linear probe in 5-fold cross-validation, seed {args.seed}. No "
            "label was judged by a probe that had learned it.",
        )
        metrics |= accuracy_estimate(metrics, data_args, len(sets["validation"]), table, model.config.num_labels)
    print_table(f"Saved to {args.output_dir}", metrics)


if __name__ == "__main__":
    main()
