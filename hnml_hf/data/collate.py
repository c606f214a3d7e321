"""From samples to a batch."""

import numpy as np
import torch
from timm.data import Mixup

from .transforms import preserved_generators, seed_generators


VIEWS = ("pixel_values", "strong_pixel_values")


def collate_images(samples: list[dict] | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stack samples of a [`TransformedDataset`] into a batch; a [`ResidentDataset`] gives whole batches already.

    Args:
        samples (`list[dict]`): b of them; or the batch itself.

    Returns:
        `dict` with `pixel_values` of shape `(b, channels, height, width)`, `strong_pixel_values` likewise if the
        samples have a second view, and `labels`, `clean_labels` (-1 = unknown) and `index` (stable sample ids) of
        shape `(b,)`, int64. If the samples have them, `held_out` (bool) and `sample_weights` (float32), `(b,)`, and
        soft targets: `target_classes` (int64) and `target_probabilities` (float32) of shape `(b, t)`.

    Example:

        _, evaluation = create_transforms(model.config.pretrained_cfg)
        loader = torch.utils.data.DataLoader(TransformedDataset(dataset, evaluation), 8, collate_fn=collate_images)
        next(iter(loader))["pixel_values"].shape
    """
    if isinstance(samples, dict):
        return samples
    return {
        name: torch.stack([sample[name] for sample in samples])
        if name in VIEWS
        else torch.as_tensor(np.stack([sample[name] for sample in samples]))
        for name in samples[0]
    }


def collate_readable(samples: list[dict]) -> dict[str, np.ndarray | torch.Tensor | None]:
    """Stack samples; those whose image cannot be read have none.

    Args:
        samples (`list[dict]`): b of them; `pixel_values` of r are a tensor, of the others None.

    Returns:
        `dict` with `pixel_values` of shape `(r, channels, height, width)`, or None if r is 0; and all else that the
        samples have, as `np.ndarray` of shape `(b, ...)`.
    """
    images = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
    columns = {name: np.stack([sample[name] for sample in samples]) for name in samples[0] if name != "pixel_values"}
    return {**columns, "pixel_values": torch.stack(images) if images else None}


class MixupCollator:
    """Collates, then mixes the batch with timm's `Mixup`, for objectives that take soft labels (`ce` and `hnml`).

    Adds `soft_labels` of shape `(b, k)`. Image i is mixed with image b - 1 - i; both views of an image alike. How much
    follows from the sample ids of the batch, so a resumed run mixes alike. A batch with an odd number of images, as
    the last one may be, stays unmixed. For training alone: [`HNMLTrainer`] evaluates with `unmixed`.

    Args:
        num_labels (`int`): number of classes k.
        mixup_alpha (`float`): Beta parameter of mixup (Zhang et al., ICLR 2018); 0 = off.
        seed (`int`): of the draws.

    Example:

        collator = MixupCollator(model.config.num_labels, mixup_alpha=0.4)  # `data_collator` of the trainer
    """

    def __init__(self, num_labels: int, *, mixup_alpha: float = 0.0, seed: int = 0):
        self.mixup = Mixup(mixup_alpha, label_smoothing=0.0, num_classes=num_labels)
        self.num_labels, self.seed = num_labels, seed

    unmixed = staticmethod(collate_images)

    def __repr__(self) -> str:
        return f"MixupCollator(mixup_alpha={self.mixup.mixup_alpha})"

    def __call__(self, samples: list[dict] | dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = collate_images(samples)
        if len(batch["index"]) % 2:
            batch["soft_labels"] = torch.nn.functional.one_hot(batch["labels"], self.num_labels).float()
            return batch
        with preserved_generators():
            seed_generators(self.seed, *batch["index"].tolist())
            views = [name for name in VIEWS if name in batch]
            mixed, batch["soft_labels"] = self.mixup(torch.cat([batch[name] for name in views], 1), batch["labels"])
            batch |= dict(zip(views, mixed.chunk(len(views), 1), strict=True))
        return batch
