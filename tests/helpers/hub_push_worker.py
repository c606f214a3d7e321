"""Run by test_hub.py: trains a little, pushes in all ways, and writes down what went wrong where it should."""

import json
import sys
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from huggingface_hub import HfApi
from huggingface_hub.constants import ENDPOINT
from PIL import Image as PILImage

import hnml_hf
from hnml_hf.hub import upload as hub
from hnml_hf.modeling import hub_client


OUT = Path(sys.argv[1])
NAMES = ["left", "right", "bottom"]


def admin(path: str):
    urllib.request.urlopen(ENDPOINT + path).read()


def said(action) -> str:
    try:
        action()
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def dataset() -> Dataset:
    """48 images of noise in three classes; 18 labels are wrong."""
    random, clean = np.random.default_rng(0), np.arange(48) % 3
    labels = np.where(np.arange(48) % 9 < 3, (clean + 1) % 3, clean)
    images = [PILImage.fromarray(pixels) for pixels in random.integers(0, 255, (48, 32, 32, 3), dtype=np.uint8)]
    label = ClassLabel(names=NAMES)
    return Dataset.from_dict(
        {"image": images, "label": labels.tolist(), "clean_label": clean.tolist(), "index": list(range(100, 148))},
        features=Features({"image": Image(), "label": label, "clean_label": label, "index": Value("int64")}),
    )


def trainer(data: Dataset, folder: str, **options) -> hnml_hf.HNMLTrainer:
    torch.manual_seed(0)
    model = hnml_hf.TimmCAMForImageClassification.from_timm(
        "test_resnet", id2label=dict(enumerate(NAMES)), image_size=64
    )
    train, evaluation = hnml_hf.create_transforms(model.config.pretrained_cfg)
    args = hnml_hf.HNMLTrainingArguments(
        str(OUT / folder),
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        save_strategy="epoch",
        eval_strategy="epoch",
        logging_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return hnml_hf.HNMLTrainer(
        model,
        args,
        train_dataset=hnml_hf.TransformedDataset(data, train),
        eval_dataset=hnml_hf.TransformedDataset(data, evaluation),
        data_collator=hnml_hf.collate_images,
        compute_metrics=hnml_hf.compute_metrics,
        processing_class=hnml_hf.create_image_processor(model.config.pretrained_cfg),
    )


def main():
    data, heard, folder = dataset(), {}, OUT / "run"
    run = trainer(data, "run", push_to_hub=True, hub_model_id="tester/tiny", hub_strategy="all_checkpoints")
    result = run.train()
    run.save_metrics("all", {**result.metrics, **run.evaluate()}, combined=False)
    for name in ("photo_list.csv", "training_args.bin", "pytorch_model.bin", "rows.jsonl"):
        (folder / name).write_text("not for others")
    heard["oid"] = run.push_to_hub(dataset="user/flowers", noise="a third of the labels", license="mit").oid
    run.model.push_to_hub("by-model")
    heard["pull request"] = run.model.push_to_hub("by-model", create_pr=True).pr_revision
    hub.push_to_hub(folder, "tester/by-function", private=False, revision="v2", commit_message="one")

    hub_client.ANSWER_WITHIN = 2
    for status in (401, 403, 404, 500, 0):
        admin(f"/_fail/{status}/")
        heard[str(status)] = said(lambda: hub.push_to_hub(folder, "tester/unlucky"))
        admin("/_mend")
    admin("/_fail/500/commit")
    heard["half"] = said(lambda: hub.push_to_hub(folder, "tester/half"))
    again = trainer(data, "again", push_to_hub=True, hub_model_id="tester/again", hub_strategy="every_save")
    again.train()
    heard["trained"] = again.state.global_step
    heard["final"] = said(again.push_to_hub)
    admin("/_fail/401/")
    heard["early"] = said(lambda: trainer(data, "early", push_to_hub=True, hub_model_id="tester/early"))
    admin("/_mend")
    hub_client.HfApi = partial(HfApi, endpoint="http://127.0.0.1:9")
    heard["nobody"] = said(lambda: hub.push_to_hub(folder, "tester/nobody"))
    (OUT / "heard.json").write_text(json.dumps(heard))


if __name__ == "__main__":
    main()
