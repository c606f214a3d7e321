"""Weights of the small ResNet of the CPU protocol that come from its training images alone, without any label: SimCLR
(Chen et al., ICML 2020) with its loss, its crops and its color changes.

python docs/results/self-supervised.py data/cifar10n-10k/train.parquet outputs/simclr.safetensors [EPOCHS]
"""

import sys
import time

import numpy as np
import timm
import torch
from datasets import load_dataset
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from hnml_hf.data.resident import crop_boxes, resample, uniform_draws


BATCH, TEMPERATURE, RATE, WARM_UP = 256, 0.2, 0.3, 0.05
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # timm's for this network
GRAY = torch.tensor([0.299, 0.587, 0.114])[:, None, None]


def view(images: torch.Tensor, seed: int, epoch: int, index: np.ndarray) -> torch.Tensor:
    """A random crop, mirrored or not, with changed brightness, contrast and saturation, or none of its colors."""
    draws = torch.from_numpy(uniform_draws(seed, epoch, index, 10))
    pixels = resample(images, crop_boxes(draws[:, :5], 32, 32), draws[:, 2] < 0.5, (32, 32), "bilinear") / 255
    strength = (0.6 + 0.8 * draws[:, 5:8])[:, :, None, None, None]
    pixels = pixels * strength[:, 0]
    pixels = (pixels - pixels.mean((1, 2, 3), keepdim=True)) * strength[:, 1] + pixels.mean((1, 2, 3), keepdim=True)
    gray = (pixels * GRAY).sum(1, keepdim=True)
    pixels = (pixels - gray) * strength[:, 2] + gray
    pixels = torch.where((draws[:, 8] < 0.2)[:, None, None, None], gray.expand_as(pixels), pixels).clamp(0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def contrast(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """NT-Xent: each view finds the other one of its image among all of the batch."""
    both = F.normalize(torch.cat([first, second]), dim=1)
    likeness = (both @ both.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(likeness, torch.arange(len(both)).roll(len(first)))


def main(table: str, file: str, epochs: str = "60"):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = load_dataset("parquet", data_files=table, split="train")
    images = torch.from_numpy(np.stack([np.asarray(image) for image in rows["image"]])).permute(0, 3, 1, 2)
    network = timm.create_model(  # its head of two classes is not used, and is there since files of weights have one
        "resnet10t", num_classes=2, output_stride=16, channels=[24, 48, 96, 192], stem_width=12
    ).to(memory_format=torch.channels_last)
    width = network.num_features

    def features(pixels: torch.Tensor) -> torch.Tensor:
        return network.forward_head(network.forward_features(pixels), pre_logits=True)

    projector = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 64))
    parameters = [*network.parameters(), *projector.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = int(epochs) * (len(images) // BATCH)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=WARM_UP, cycle_momentum=False)
    started = time.perf_counter()
    for epoch in range(int(epochs)):
        losses = []
        order = np.random.default_rng(epoch).permutation(len(images))
        for index in np.array_split(order, len(images) // BATCH):
            chosen = images[torch.from_numpy(index)]
            first, second = (projector(features(view(chosen, seed, epoch, index))) for seed in (1, 2))
            loss = contrast(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            plan.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}  loss {np.mean(losses):.3f}  {time.perf_counter() - started:.0f} s", flush=True)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
