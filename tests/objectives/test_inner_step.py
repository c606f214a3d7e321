import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from hnml_hf.objectives.inner_step import (
    gradient_step,
    head_step_logits,
    head_step_weights,
    inner_loss,
    label_residuals,
    look_ahead,
    running_directions,
    swapped_label_loss_drop,
)


def test_inner_loss_by_hand():
    """p = (1/2, 1/2), label 0: CE = ln 2. q = (1, 0): KL = ln 2. With lambda = 3: 4 ln 2."""
    logits, teacher = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    loss = inner_loss(logits, torch.tensor([0]), teacher_probabilities=teacher, consistency_weight=3.0)
    assert_close(loss.item(), 4 * math.log(2))


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


def test_residuals_are_the_gradient_of_the_inner_loss(generator):
    logits = torch.randn(5, 3, generator=generator, dtype=torch.double, requires_grad=True)
    labels = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]])
    teacher = torch.randn(5, 3, generator=generator, dtype=torch.double).softmax(-1)
    options = {"teacher_probabilities": teacher, "consistency_weight": 0.7}
    for drawn, residuals in zip(labels, label_residuals(logits, labels, **options), strict=True):
        (gradient,) = torch.autograd.grad(inner_loss(logits, drawn, **options), logits)
        assert_close(residuals / 5, gradient)


def head_problem(seed: int, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    trunk = torch.randn(7, 4, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 4, generator=generator, dtype=dtype, requires_grad=True)
    bias = torch.randn(3, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(3, (2, 7), generator=generator)
    return trunk, weight, bias, labels


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("consistency_weight", [0.0, 0.5])
def test_head_closed_form_equals_autograd(second_order, consistency_weight):
    """Values, rows of the new weight and all gradients, against an explicit gradient step on weight and bias."""
    trunk, weight, bias, labels = head_problem(0)
    teacher = torch.full((7, 3), 1 / 3, dtype=torch.double)
    inner = {"teacher_probabilities": teacher, "consistency_weight": consistency_weight}
    classes = torch.tensor([0, 2, 1, 1, 0, 2, 2])

    def by_autograd(features):
        logits = F.linear(features, weight, bias)
        results = []
        for drawn in labels:
            fast = gradient_step(
                inner_loss(logits, drawn, **inner), {"w": weight, "b": bias}, lr=0.9, second_order=second_order
            )
            results.append((F.linear(features, fast["w"], fast["b"]), fast["w"][classes]))
        return [torch.stack(parts) for parts in zip(*results, strict=True)]

    def in_closed_form(features):
        logits = F.linear(features, weight, bias)
        residuals, support = label_residuals(logits, labels, **inner), features
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


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.AdamW, {"betas": (0.8, 0.99)})],
)
def test_running_directions_are_the_optimizers_own_steps(optimizer_class, options, generator):
    """Times the learning rate they are what the last step subtracted: alpha / learning rate counts steps."""
    parameter = nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
    optimizer = optimizer_class([parameter], lr=0.01, weight_decay=0.0, **options)
    assert running_directions(optimizer) == {}
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        optimizer.step()
        assert_close(0.01 * running_directions(optimizer)[parameter], before - parameter.detach())


def test_running_directions_need_a_running_gradient():
    with pytest.raises(ValueError, match="momentum=0.9"):
        running_directions(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adamax([parameter])  # betas, but no second moment
    parameter.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ValueError, match="Adamax"):
        running_directions(optimizer)


def test_look_ahead_moves_and_restores_bitwise():
    parameter = nn.Parameter(torch.tensor([0.1, 1e-8, 3e7]))
    direction, before = torch.tensor([0.3, 7.0, -1.0]), parameter.detach().clone()
    with look_ahead({parameter: direction}, lr=0.5):
        assert_close(parameter.detach(), before - 0.5 * direction)
    assert torch.equal(parameter.detach(), before)


def test_look_ahead_restores_when_the_step_raises():
    parameter = nn.Parameter(torch.tensor([0.1]))
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), look_ahead({parameter: torch.ones(1)}, lr=1 / 3):
        raise RuntimeError("inside")
    assert torch.equal(parameter.detach(), before)


def test_gradient_of_the_look_ahead_is_taken_there():
    """loss = w^2, w = 1, v = 1, lr = 0.25: gradient 2 x 0.75 = 1.5, left on the parameter that is 1 again."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    with look_ahead({parameter: torch.ones(1)}, lr=0.25):
        parameter.square().sum().backward()
    assert parameter.grad.item() == 1.5 and parameter.item() == 1.0


def test_swapped_label_loss_drop_by_hand():
    """One label swapped from 0 to 1. Loss before ln 2; after, p_1 = 1/sqrt 2, so half of it: the drop is 0.5."""
    logits = torch.zeros(2, 2)
    ratio = math.log(1 / (math.sqrt(2) - 1))  # logit with p_1 = 1 / sqrt 2
    fast = torch.tensor([[[0.0, ratio], [9.0, -9.0]]])
    drop = swapped_label_loss_drop(logits, fast, torch.tensor([0, 0]), torch.tensor([[1, 0]]))
    assert_close(drop.item(), 0.5)
    assert swapped_label_loss_drop(logits, fast, torch.tensor([0, 0]), torch.tensor([[0, 0]])).isnan()


def diverges(curvature, *, look, rate=0.05, momentum=0.9, steps=1500):
    """v <- beta v + h (theta - alpha v), theta <- theta - eta v on the loss h theta^2 / 2, from theta = 1."""
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=rate, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        with look_ahead(running_directions(optimizer), lr=look):
            (curvature * theta.square() / 2).backward()
        optimizer.step()
        if theta.detach().abs() > 1e6:
            return True
    return False


@pytest.mark.parametrize("look", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("rate", [0.05, 0.005])
def test_look_ahead_lowers_the_curvature_it_can_settle_in(look, rate):
    """Stable up to h = 2 (1 + beta) / (eta + 2 alpha): a ceiling that stays where it is when the learning rate falls.

    The step is linear with determinant beta - alpha h and trace 1 - eta h + beta - alpha h; both of its eigenvalues
    lie in the unit circle if 1 + trace + determinant > 0 and |determinant| < 1 (Jury).
    """
    ceiling = 2 * 1.9 / (rate + 2 * look)
    assert not diverges(0.95 * ceiling, look=look, rate=rate)
    assert diverges(1.05 * ceiling, look=look, rate=rate)
