import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from hnml_hf.objectives.inner_step import (
    gradient_step,
    head_step_logits,
    head_step_weights,
    label_residuals,
    swapped_label_loss_drop,
)


def test_gradient_step_by_hand():
    """loss = w^3 at w = 2: gradient 12, so w' = 2 - 0.1 x 12 = 0.8. dw'/dw = 1 - 0.1 x 6 w = -0.2; first order 1."""
    for second_order, derivative in ((True, -0.2), (False, 1.0)):
        weight = torch.tensor(2.0, requires_grad=True)
        fast = gradient_step(weight**3, {"w": weight}, lr=0.1, second_order=second_order)["w"]
        fast.backward()
        assert_close(fast.item(), 0.8)
        assert_close(weight.grad.item(), derivative)


def test_gradient_step_leaves_unused_weights_alone():
    used, unused = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    fast = gradient_step(2 * used, {"used": used, "unused": unused}, lr=1.0, second_order=True)
    assert fast["unused"] is unused and fast["used"].item() == -1


def test_residuals_are_the_gradient_of_the_cross_entropy(generator):
    logits = torch.randn(5, 3, generator=generator, dtype=torch.double, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    for drawn, residuals in zip(labels, label_residuals(logits, labels), strict=True):
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, drawn), logits)
        assert_close(residuals / 5, gradient)


def head_problem(seed: int, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    trunk = torch.randn(7, 4, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 4, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(3, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(3, (2, 7), generator=generator)
    return trunk, weight, bias, labels


@pytest.mark.parametrize("second_order", [False, True])
def test_head_closed_form_equals_autograd(second_order):
    """Values, rows of the new weight and all gradients, against an explicit gradient step on weight and bias."""
    trunk, weight, bias, labels = head_problem(0)
    classes = torch.tensor([0, 2, 1, 1, 0, 2, 2])

    def by_autograd(features):
        logits = F.linear(features, weight, bias)
        results = []
        for drawn in labels:
            loss = F.cross_entropy(logits, drawn)
            fast = gradient_step(loss, {"w": weight, "b": bias}, lr=0.9, second_order=second_order)
            results.append((F.linear(features, fast["w"], fast["b"]), fast["w"][classes]))
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    def in_closed_form(features):
        logits = F.linear(features, weight, bias)
        residuals, support = label_residuals(logits, labels), features
        if not second_order:
            residuals, support = residuals.detach(), support.detach()
        return [
            head_step_logits(logits, features, support, residuals, lr=0.9),
            head_step_weights(weight, classes, support, residuals, lr=0.9),
        ]

    gradients = []
    for form in (by_autograd, in_closed_form):
        logits, rows = form(trunk.tanh())
        loss = logits.square().sum() + (rows * torch.arange(4)).square().sum()
        gradients.append([logits, rows, *torch.autograd.grad(loss, [trunk, weight, bias])])
    for autograd, closed in zip(*gradients, strict=True):
        assert_close(autograd, closed)


def test_mean_over_draws_tends_to_the_expected_labels(generator):
    """z' is linear in the labels: the mean over many draws is the step on the mean label."""
    trunk, weight, bias, _ = head_problem(1)
    logits = F.linear(trunk, weight, bias)
    labels = torch.randint(3, (4000, 7), generator=generator)
    fast = head_step_logits(logits, trunk, trunk, label_residuals(logits, labels), lr=0.9).mean(0)
    expected_residuals = logits.softmax(-1) - F.one_hot(labels, 3).double().mean(0)
    assert_close(fast, head_step_logits(logits, trunk, trunk, expected_residuals[None], lr=0.9)[0])


def test_swapped_label_loss_drop_by_hand():
    """One label swapped from 0 to 1. Loss before ln 2; after, p_1 = 1/sqrt 2, so half of it: the drop is 0.5."""
    logits = torch.zeros(2, 2)
    ratio = math.log(1 / (math.sqrt(2) - 1))  # logit with p_1 = 1 / sqrt 2
    fast = torch.tensor([[[0.0, ratio], [9.0, -9.0]]])
    drop = swapped_label_loss_drop(logits, fast, torch.tensor([0, 0]), torch.tensor([[1, 0]]))
    assert_close(drop.item(), 0.5)
    assert swapped_label_loss_drop(logits, fast, torch.tensor([0, 0]), torch.tensor([[0, 0]])).isnan()
