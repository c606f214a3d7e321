import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hnml_hf import HNMLTrainingArguments
from hnml_hf.training.extrapolation import extrapolated, running_directions


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


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, 40),
        ({"optim": "adamw_torch"}, 1),
        ({"optim": "adamw_torch_fused"}, 1),
        ({"optim": "adamw_torch", "extrapolation": 3}, 3),
        ({"optim": "adamw_torch", "objective": "ce"}, 0),
    ],
)
def test_adam_is_not_followed_as_far_as_sgd(options, steps, tmp_path):
    args = HNMLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{"objective": "hnml", **options})
    assert args.extrapolation == steps


def test_running_directions_need_a_running_gradient():
    with pytest.raises(ValueError, match="momentum=0.9"):
        running_directions(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adamax([parameter])  # betas, but no second moment
    parameter.grad = torch.ones(1)
    optimizer.step()
    with pytest.raises(ValueError, match="Adamax"):
        running_directions(optimizer)


def test_extrapolation_moves_and_restores_bitwise():
    parameter = nn.Parameter(torch.tensor([0.1, 1e-8, 3e7]))
    direction, before = torch.tensor([0.3, 7.0, -1.0]), parameter.detach().clone()
    with extrapolated({parameter: direction}, distance=0.5):
        assert_close(parameter.detach(), before - 0.5 * direction)
    assert torch.equal(parameter.detach(), before)


def test_the_normalized_direction_has_length_one_over_all_weights():
    """v = (3, 4) over two parameters has the norm 5."""
    first, second = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))
    directions = {first: torch.tensor([3.0]), second: torch.tensor([4.0])}
    with extrapolated(directions, distance=0.5, normalized=True):
        assert_close(torch.cat([first, second]).detach(), torch.tensor([1 - 0.5 * 0.6, 1 - 0.5 * 0.8]))
    assert first.item() == second.item() == 1
    with extrapolated({first: torch.zeros(1)}, distance=0.5, normalized=True):
        assert first.item() == 1


def test_extrapolation_restores_when_the_step_raises():
    parameter = nn.Parameter(torch.tensor([0.1]))
    before = parameter.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), extrapolated({parameter: torch.ones(1)}, distance=1 / 3):
        raise RuntimeError("inside")
    assert torch.equal(parameter.detach(), before)


def test_gradient_of_the_extrapolation_is_taken_there():
    """loss = w^2, w = 1, v = 1, d = 0.25: gradient 2 x 0.75 = 1.5, left on the parameter that is 1 again."""
    parameter = nn.Parameter(torch.tensor([1.0]))
    with extrapolated({parameter: torch.ones(1)}, distance=0.25):
        parameter.square().sum().backward()
    assert parameter.grad.item() == 1.5 and parameter.item() == 1.0


def diverges(curvature, *, look, rate=0.05, momentum=0.9, steps=1500):
    """v <- beta v + h (theta - alpha v), theta <- theta - eta v on the loss h theta^2 / 2, from theta = 1."""
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=rate, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        with extrapolated(running_directions(optimizer), distance=look):
            (curvature * theta.square() / 2).backward()
        optimizer.step()
        if theta.detach().abs() > 1e6:
            return True
    return False


@pytest.mark.parametrize("look", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("rate", [0.05, 0.005])
def test_extrapolation_lowers_the_curvature_it_can_settle_in(look, rate):
    """Stable up to h = 2 (1 + beta) / (eta + 2 alpha): a ceiling that stays where it is when the learning rate falls.

    The step is linear with determinant beta - alpha h and trace 1 - eta h + beta - alpha h; both of its eigenvalues
    lie in the unit circle if 1 + trace + determinant > 0 and |determinant| < 1 (Jury).
    """
    ceiling = 2 * 1.9 / (rate + 2 * look)
    assert not diverges(0.95 * ceiling, look=look, rate=rate)
    assert diverges(1.05 * ceiling, look=look, rate=rate)
