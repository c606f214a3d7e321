"""From samples to a batch."""

import torch


def collate_images(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Stack samples of a [`TransformedDataset`] into a batch.

    Returns:
        `dict` with `pixel_values` of shape `(b, channels, height, width)`, and `labels`, `clean_labels` (-1 = unknown) and
        `index` (stable sample ids) of shape `(b,)`, int64.
    """
    batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
    for name in ("labels", "clean_labels", "index"):
        batch[name] = torch.tensor([sample[name] for sample in samples], dtype=torch.int64)
    return batch
