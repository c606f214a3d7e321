"""Which targets are best for a small network on frozen features of all of CIFAR-10N `worse`; made frozen-targets.json.

    python docs/results/frozen-targets.py FEATURES LABELS frozen-targets.json --seeds 0 1 2

FEATURES is a folder with train.npy, mirrored.npy (the same images, mirrored) and test.npy, float32 of shape (n, 1280):
what EfficientNet-lite0 with ImageNet weights gives its last layer at 128 pixels. LABELS is an npz file with `given`,
`clean` and `test`. `bayes` is P(c | image, given y) ~ p_c T[c, y], p the network's own prediction and T the judge's
transition matrix.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hnml_hf.audit.judge import judge_labels
from hnml_hf.objectives.elr import CLAMP, early_learning_regularizer


HELD_OUT, WIDTH, EPOCHS, BATCH, RATE, DECAY = 5_000, 256, 4, 128, 0.02, 0.99
METHODS = {  # base targets, ELR, refreshed after the second epoch
    "cross-entropy": ("given", False, False),
    "ELR": ("given", True, False),
    "forward correction by T": ("bayes", False, False),
    "posterior": ("posterior", False, False),
    "mean of posterior and bayes": ("both", False, False),
    "posterior, refreshed": ("posterior", False, True),
    "ELR on the posterior": ("posterior", True, False),
    "ELR on the posterior, refreshed": ("posterior", True, True),
    "cross-entropy on clean labels": ("clean", False, False),
}


def run(data: dict, method: str, seed: int, rate: float) -> dict:
    """Train and measure one method."""
    base, elr, refreshed = METHODS[method]
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, WIDTH), nn.ReLU(), nn.Dropout(0.3), nn.Linear(WIDTH, 10))
    average = copy.deepcopy(net).eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    given, channel = data["given"], data["transition"][:, data["given"]].T
    rows, step = len(given), 0
    steps, memory = EPOCHS * (rows // BATCH), torch.zeros(rows, 10)
    targets = {"given": F.one_hot(given, 10).float(), "clean": F.one_hot(data["clean"], 10).float()}
    targets["posterior"] = targets["both"] = data["posterior"]
    for epoch in range(EPOCHS):
        for batch in torch.randperm(rows)[: rows // BATCH * BATCH].split(BATCH):
            warm = 0.1 * steps
            shape = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
            optimizer.param_groups[0]["lr"] = rate * min(shape, 1)
            mirrored = (torch.rand(len(batch)) < 0.5)[:, None]
            logits = net(torch.where(mirrored, data["mirrored"][batch], data["train"][batch]))
            probabilities = logits.detach().softmax(1)
            bayes = probabilities * channel[batch]
            bayes = bayes / bayes.sum(1, keepdim=True)
            wanted = bayes if base == "bayes" else targets[base][batch]
            if base == "both":
                wanted = (wanted + bayes) / 2
            loss = -(wanted * logits.log_softmax(1)).sum(1)
            if elr:
                clamped = probabilities.clamp(CLAMP, 1 - CLAMP)
                memory[batch] = 0.7 * memory[batch] + 0.3 * clamped / clamped.sum(1, keepdim=True)
                loss = loss + 3 * early_learning_regularizer(logits, memory[batch])
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            step += 1
            with torch.no_grad():
                kept = min(DECAY, 1 - step ** (-2 / 3))
                torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - kept)
        if refreshed and epoch == 1:
            with torch.no_grad():
                hidden = average[:3](data["train"]).numpy()
            newest = judge_labels(hidden, given.numpy(), num_labels=10).posterior
            targets["posterior"] = (data["posterior"] + torch.from_numpy(newest)) / 2

    @torch.no_grad()
    def accuracy(inputs: torch.Tensor, labels: torch.Tensor) -> float:
        return round(float((average(inputs).argmax(1) == labels).float().mean()), 4)

    right = (targets["posterior"].argmax(1) == data["clean"]).float().mean()
    return {
        "method": method,
        "seed": seed,
        "learning_rate": rate,
        "test": accuracy(data["test"], data["test_labels"]),
        "held_out_noisy": accuracy(data["held_out"], data["held_out_given"]),
        "posterior_right": round(float(right), 4),
    }


def load(folder: Path, labels_file: Path) -> dict:
    """Standardized features, labels and the judge's view of those that train."""
    train, mirrored, test = (np.load(folder / f"{name}.npy") for name in ("train", "mirrored", "test"))
    labels = np.load(labels_file)
    order = np.random.default_rng(0).permutation(len(train))
    held_out, rows = order[:HELD_OUT], order[HELD_OUT:]
    judgement = judge_labels(train[rows], labels["given"][rows], num_labels=10)
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    views = {"train": train[rows], "mirrored": mirrored[rows], "test": test, "held_out": train[held_out]}
    data = {name: torch.from_numpy((view - mean) / deviation).float() for name, view in views.items()}
    numbers = {"given": labels["given"][rows], "clean": labels["clean"][rows], "test_labels": labels["test"]}
    numbers["held_out_given"] = labels["given"][held_out]
    data |= {name: torch.from_numpy(values).long() for name, values in numbers.items()}
    data["posterior"] = torch.from_numpy(judgement.posterior)
    data["transition"] = torch.from_numpy(judgement.transition_matrix)
    return data


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, data = time.perf_counter(), load(args.features, args.labels)
    runs = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    for seed in args.seeds:
        for rate in args.rates:
            for method in args.methods:
                runs.append(run(data, method, seed, rate))
                args.output.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
                print(runs[-1], round(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
