"""Small trainers, and what they are compared by."""

import torch

from hnml_hf import (
    HNMLTrainer,
    HNMLTrainingArguments,
    TimmCAMForImageClassification,
    TransformedDataset,
    collate_images,
    compute_metrics,
    create_transforms,
)


# name: (objective and its options); every form of the virtual step is here once
FORMS = {
    "ce": {"objective": "ce"},
    "gce": {"objective": "gce"},
    "elr": {"objective": "elr"},
    "mean_teacher": {"objective": "mean_teacher"},
    "mlnt": {"objective": "mlnt", "meta_scope": "full", "second_order": True},
    "momentum": {"objective": "hnml"},
    "head": {"objective": "hnml_synthetic", "meta_scope": "head", "num_meta_draws": 3},
    "full": {"objective": "hnml_synthetic", "meta_scope": "full"},
}


def build_model(seed=0, image_size=32):
    torch.manual_seed(seed)
    return TimmCAMForImageClassification.from_timm("test_resnet", num_labels=3, image_size=image_size, output_stride=8)


def arguments(output_dir, **options):
    defaults = {
        "per_device_train_batch_size": 12,
        "max_steps": 3,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "num_neighbors": 4,
        "monitor_fraction": 0,  # full weight from the first step; see test_memorization.py
        "consistency_weight": 1,
        "mask_weight": 1,  # off by default
    }
    return HNMLTrainingArguments(output_dir=str(output_dir), **{**defaults, **options})


def build_trainer(output_dir, dataset, model=None, augmentation="none", collator=collate_images, **options):
    model = model or build_model()
    transform, evaluation = create_transforms(model.config.pretrained_cfg, augmentation=augmentation)
    return HNMLTrainer(
        model=model,
        args=arguments(output_dir, **options),
        train_dataset=TransformedDataset(dataset, transform),
        eval_dataset=TransformedDataset(dataset, evaluation),
        data_collator=collator,
        compute_metrics=compute_metrics,
    )


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def network(teacher):
    return None if teacher is None else teacher.network


def assert_same_networks(one, other):
    """Bit for bit, students and teachers."""
    for this, that in ((one.model, other.model), (network(one.teacher), network(other.teacher))):
        assert (this is None) == (that is None)
        for name, value in {} if this is None else this.state_dict().items():
            assert torch.equal(value, that.state_dict()[name]), name


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
