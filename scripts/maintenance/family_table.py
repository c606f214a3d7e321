"""Which timm backbones work, and how far: builds each from random weights and tries what a user would do with it.

    python scripts/maintenance/family_table.py --output docs/families.md --json docs/results/families.json
    python scripts/maintenance/family_table.py --only resnet,convnext

For each architecture: build it, take one training step for each kind of virtual step, draw activation maps, save the
folder and load it back with this package, with timm alone and with transformers' Auto class, and compare the logits.
"""

import argparse
import copy
import gc
import json
import platform
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers
from family_list import ARCHITECTURES, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from hnml_hf import TimmCAMForImageClassification
from hnml_hf.objectives import OBJECTIVES
from hnml_hf.objectives.batch_view import BatchView
from hnml_hf.training.extrapolation import extrapolated, running_directions
from hnml_hf.training.flops import counting_flops


NUM_LABELS = 10
ROUNDING = 1e-6  # where batch norm stands before the last layer, our two steps round otherwise than timm's one
STEPS = {  # column: what the virtual step is
    "momentum": {"objective": "hnml"},
    "head": {"objective": "hnml_synthetic", "meta_scope": "head", "second_order": True},
    "full": {"objective": "hnml_synthetic", "meta_scope": "full", "second_order": False},
    "full, second order": {"objective": "hnml_synthetic", "meta_scope": "full", "second_order": True},
}
SECOND_ORDER_UP_TO = 8_000_000  # parameters; larger ones take minutes each on a processor
REFUSALS = (ValueError,)
FAULTS = (
    RuntimeError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
    NotImplementedError,
    ImportError,
)


def training_step(model, pixel_values, labels, *, objective: str, **options) -> dict:
    """One step of HNML without a Trainer. Leaves gradients in the model; returns the mean of each term of the loss."""
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    for parameter in teacher.parameters():  # a teacher equal to its student would make the consistency vanish
        parameter.add_(0.1 * parameter.std(unbiased=False) * torch.randn_like(parameter))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    if objective == "hnml":
        model(pixel_values, labels=labels).loss.backward()
        optimizer.step()  # fills the running gradient; the weights stay, at a learning rate of zero
        optimizer.zero_grad()
    with extrapolated(running_directions(optimizer), distance=0.01), sdpa_kernel(SDPBackend.MATH):
        if objective == "hnml_synthetic":
            generator = torch.Generator().manual_seed(0)
            options |= {"generator": generator, "meta_lr": 0.01, "num_meta_draws": 1, "perturb_ratio": 0.5}
            options["num_neighbors"] = 2
        terms, _ = model(
            pixel_values,
            step=lambda model, pixel_values: OBJECTIVES[objective](
                BatchView(model, pixel_values),
                labels,
                active_terms={"base", "consistency", "mask_guided"},
                teacher=torch.no_grad()(lambda: teacher(pixel_values, cam_classes="predicted")),
                **options,
            ),
        )
        sum(term.mean() for term in terms.values()).backward()
    return {name: term.mean().item() for name, term in terms.items()}


def try_step(model, pixel_values, labels, **kind) -> str:
    """`yes`, or what went wrong."""
    student = copy.deepcopy(model).train()
    try:
        with counting_flops():  # as in the trainer, whose counter puts hooks on modules
            terms = training_step(student, pixel_values, labels, **kind)
    except REFUSALS as error:
        return f"refused: {first_line(error)}"
    except FAULTS as error:
        return f"failed: {type(error).__name__}: {first_line(error)}"
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    if not all(torch.isfinite(gradient).all() for gradient in gradients) or any(t != t for t in terms.values()):
        return "failed: a gradient or a term is not finite"
    if not any(gradient.abs().max() > 0 for gradient in gradients) or terms["mask_guided"] <= 0:
        return "failed: no gradient, or no mask-guided term"
    return "yes"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def same_logits(first, second) -> str:
    """`bitwise`, or the largest difference."""
    return "bitwise" if torch.equal(first, second) else f"{(first - second).abs().max().item():.1e}"


@torch.no_grad()
def load_back(model, pixel_values, folder) -> dict[str, str]:
    """Saves the model and loads it in the three libraries; compares the logits."""
    model.save_pretrained(folder)
    expected = model(pixel_values).logits
    loaders = {
        "this package": lambda: TimmCAMForImageClassification.from_pretrained(folder),
        "timm": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
        "transformers": lambda: AutoModelForImageClassification.from_pretrained(folder),
    }
    outcome = {}
    for name, load in loaders.items():
        try:
            output = load().eval()(pixel_values)
        except (*REFUSALS, *FAULTS, OSError) as error:
            outcome[name] = f"failed: {type(error).__name__}: {first_line(error)}"
        else:
            outcome[name] = same_logits(expected, output if isinstance(output, torch.Tensor) else output.logits)
    return outcome


def examine(architecture: str, image_size: int | None, model_args: dict) -> dict:
    """Everything that is tried with one architecture, as a flat record of outcomes."""
    torch.manual_seed(0)
    try:
        model = TimmCAMForImageClassification.from_timm(
            architecture, num_labels=NUM_LABELS, image_size=image_size, **model_args
        )
    except REFUSALS as error:
        return {"built": f"refused: {first_line(error)}"}
    except FAULTS as error:
        return {"built": f"failed: {type(error).__name__}: {first_line(error)}"}
    with torch.no_grad():  # timm starts some classifiers at zero, where no map could differ from another
        for parameter in model.head_parameters().values():
            parameter.normal_(std=0.05)
    model.eval()
    pixel_values, labels = torch.randn(4, *model.input_size), torch.tensor([0, 1, 2, 3])
    record = {
        "built": "yes",
        "image size": model.input_size[-1],
        "model_args": {name: value for name, value in model.config.model_args.items() if name not in model_args},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }

    output = model(pixel_values, cam_classes="predicted")
    cams = output.cams.detach()
    record["map"] = "x".join(map(str, cams.shape[-2:]))
    constant = (cams.flatten(1).std(1) <= 1e-6 * cams.flatten(1).abs().amax(1)).any() or not torch.isfinite(cams).all()
    record["cam"] = "failed: constant or not finite" if constant else "yes"
    predicted = output.logits.detach().amax(1)
    record["whole model"] = same_logits(model.timm_model(pixel_values).detach(), output.logits.detach())
    if model._pool_is_mean:
        bias = model.class_bias[output.logits.argmax(1)].detach()
        error = ((cams.mean((1, 2)) + bias - predicted).abs().max() / predicted.abs().max().clamp_min(1)).item()
        record["closed form"] = "exact" if error < 1e-4 else f"failed: off by {error:.1e}"
    else:
        record["closed form"] = "by the head's gradient"

    model.zero_grad()
    model.train()(pixel_values, labels=labels).loss.backward()
    record["parameters without gradient"] = sum(p.grad is None for p in model.parameters())
    model.zero_grad()
    model.eval()
    for name, kind in STEPS.items():
        if name.endswith("second order") and record["parameters"] > SECOND_ORDER_UP_TO:
            record[name] = "not tried"
        else:
            record[name] = try_step(model, pixel_values, labels, **kind)
    with tempfile.TemporaryDirectory() as folder:
        record.update(load_back(model, pixel_values, folder))
    return record


LOADERS = ("this package", "timm", "transformers")


def sign(equality: str) -> str:
    """`=` for the same bits, `≈` for a difference of rounding, `≠` for any other."""
    if equality == "bitwise":
        return "="
    return "≈" if equality[0].isdigit() and float(equality) < ROUNDING else "≠"


def works(record: dict) -> bool:
    """Whether all of it works: built, maps, every step of first order, three loaders."""
    if record["built"] != "yes":
        return False
    steps = [name for name in STEPS if not name.endswith("second order")]
    return (
        record["cam"] == "yes"
        and not record["closed form"].startswith("failed")
        and all(record[name] == "yes" for name in steps)
        and all(sign(record[name]) in "=≈" for name in ("whole model", *LOADERS))
    )


def outcome(record: dict) -> str:
    """`works`, `refused` with a reason, or `works in part`."""
    if record["built"] != "yes":
        return record["built"].split(":")[0]
    return "works" if works(record) else "works in part"


def reasons(record: dict) -> list[str]:
    """What does not work, a line each."""
    found = {}
    for name, value in record.items():
        if str(value).startswith(("failed", "refused")):
            found.setdefault(str(value), []).append(name)
        elif name in ("whole model", *LOADERS) and value != "bitwise":
            found.setdefault(f"logits differ by {value}", []).append(name)
    return [value if names == ["built"] else f"{', '.join(names)}: {value}" for value, names in found.items()]


def label(row: dict) -> str:
    return f"`{row['architecture']}`" + "".join(f" `{k}={v}`" for k, v in row["model_args"].items())


def grouped(rows: list[dict], key: Callable[[dict], str | None]) -> dict[str, str]:
    """The names of backbones under each key, in the order of the rows; without those whose key is None."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if (name := key(row)) is not None:
            groups.setdefault(name, []).append(label(row))
    return {name: ", ".join(dict.fromkeys(found)) for name, found in groups.items()}


def why(row: dict) -> str:
    """A refusal in short, without the name of the backbone."""
    reason = row["record"]["built"].partition(": ")[2].partition(". ")[0].rstrip(".")
    return re.sub(r"^Backbone `[^`]+` ", "", reason).partition(", so ")[0]


def remark(row: dict) -> str | None:
    """What is particular about a backbone that works."""
    record = row["record"]
    found = [f"built with `{k}={v}`" for k, v in record["model_args"].items() if k != "img_size"]
    if record["full, second order"].startswith("failed"):
        found.append(f"no second order: {record['full, second order'].rpartition(': ')[2]}")
    if any(sign(record[name]) == "≈" for name in ("whole model", *LOADERS)):
        found.append("logits after loading equal up to rounding")
    if record["parameters without gradient"]:
        found.append("unused parameters: several devices need `--ddp_find_unused_parameters true`")
    return "; ".join(found) or None


def render(results: dict) -> str:
    """The page as Markdown: which backbones work, which are refused and why, and what is particular."""
    rows = sorted(results["rows"], key=lambda row: (row["family"], row["architecture"]))
    working = [row for row in rows if works(row["record"])]
    refused = grouped([row for row in rows if outcome(row["record"]) == "refused"], why)
    partly = [row for row in rows if outcome(row["record"]) not in ("works", "refused")]
    exact = grouped([row for row in working if row["record"]["closed form"] == "exact"], lambda row: row["family"])
    gradient = grouped([row for row in working if row["record"]["closed form"] != "exact"], lambda row: row["family"])
    families = sorted({*exact, *gradient})
    second = sum(row["record"]["full, second order"] == "yes" for row in working)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    counts = Counter(outcome(row["record"]) for row in rows)
    architectures, all_families = (len({row[key] for row in rows}) for key in ("architecture", "family"))
    in_part = "; ".join(f"{label(row)} ({'; '.join(reasons(row['record']))})" for row in partly)
    return f"""# Backbones

**Does my backbone work?** Probably, if its `get_classifier()` is one `nn.Linear` and its feature map has more than one
cell. {counts["works"]} of {len(rows)} configurations work, and {counts["refused"]} are refused with the reason: \
{architectures} architectures from {all_families} timm families.

"Works" means, from random weights with {NUM_LABELS} classes and four images:

* It builds, and its activation maps have the shape of its feature map and are not constant.
* One HNML training step gives finite gradients, with the virtual step along the momentum and on synthetic labels
  (`head` and `full`, first order).
* The saved folder gives the same logits in this package, in timm and in transformers.

Second order over the whole network was tried up to {SECOND_ORDER_UP_TO:,} parameters: {second} do it.

    python scripts/maintenance/family_table.py --output docs/families.md --json docs/results/families.json

made this page with {versions}. [Sizes, maps and outcomes of each](results/families.json).

## These work

*Exact* maps have a mean that is the logit, up to the bias. In the others something nonlinear stands between map and
logit; *gradient* maps are the logit's gradient through the head times the feature map.

| family | exact maps | gradient maps |
|---|---|---|
{chr(10).join(f"| {name} | {exact.get(name, '')} | {gradient.get(name, '')} |" for name in families)}
{f"{chr(10)}In part: {in_part}.{chr(10)}" if partly else ""}
## These are refused

| why: the backbone | which |
|---|---|
{chr(10).join(f"| {reason} | {names} |" for reason, names in refused.items())}

Take `resnet50`, `convnext_tiny` or `vit_small_patch16_224` instead, for example. A map of one cell grows with larger
images, or a smaller stride where the backbone has one (`--model_args '{{"output_stride": 8}}'`).

## Remarks

| remark | which |
|---|---|
{chr(10).join(f"| {name} | {names} |" for name, names in grouped(working, remark).items())}
"""


def as_lines(results: dict) -> str:
    """JSON with a line for each row."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in results["rows"])
    return f'{{"versions":{json.dumps(results["versions"])},"rows":[\n{rows}\n]}}\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write.")
    parser.add_argument("--json", type=Path, help="JSON file with all outcomes.")
    parser.add_argument("--only", help="Families or architectures, separated by commas.")
    parser.add_argument("--resume", action="store_true", help="Keep the outcomes that the JSON file has.")
    parser.add_argument("--tiny", action="store_true", help="The small list of the tests instead.")
    options = parser.parse_args()
    only = set(options.only.split(",")) if options.only else None
    wanted = [row for row in (TINY if options.tiny else ARCHITECTURES) if only is None or only & set(row[:2])]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")

    versions = {
        "timm": timm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    results = {"versions": versions, "rows": []}
    if options.json and options.json.exists() and options.resume:
        results["rows"] = json.loads(options.json.read_text())["rows"]
    keys = ("family", "architecture", "image_size", "model_args")
    results["rows"] = [row for row in results["rows"] if tuple(row[key] for key in keys) in wanted]
    done = [tuple(row[key] for key in keys) for row in results["rows"]]
    for family, architecture, image_size, model_args in tqdm([row for row in wanted if row not in done], unit="model"):
        started = time.perf_counter()
        record = examine(architecture, image_size, model_args)
        seconds = round(time.perf_counter() - started, 1)
        row = {"family": family, "architecture": architecture, "image_size": image_size, "model_args": model_args}
        results["rows"].append({**row, "seconds": seconds, "record": record})
        tqdm.write(
            f"{outcome(record):14}{seconds:7} s  {architecture} {model_args or ''} {'; '.join(reasons(record))}"
        )
        gc.collect()
        if options.json:
            options.json.write_text(as_lines(results))
    if options.output:
        options.output.write_text(render(results))
    print(dict(Counter(outcome(row["record"]) for row in results["rows"])))


if __name__ == "__main__":
    main()
