"""What is not finite is an error, wherever it shows: in a loss, in weights, in what a model says."""

from collections.abc import Mapping

import numpy as np
import torch

from .words import counted


WHERE_TO_LOOK = "Look at its weights, and at `mean` and `std` in its `config.json`."


class NonFiniteError(FloatingPointError):
    """A loss, a gradient, a weight or an output of a model is not finite.

    Example:

        try:
            trainer.train()
        except NonFiniteError as error:
            print(error)  # which term, in which step, of which samples
    """


def require_finite_outputs(outputs: torch.Tensor | np.ndarray, *, of: str, advice: str):
    """Raise [`NonFiniteError`] if what a model says of an image is not finite.

    Args:
        outputs (`torch.Tensor` or `np.ndarray` of shape `(n, ...)`): of n images.
        of (`str`): whose outputs they are.
        advice (`str`): what to do, as a sentence.
    """
    finite = torch.as_tensor(outputs).flatten(1).isfinite().all(1)
    if not finite.all():
        raise NonFiniteError(
            f"The outputs of {of} are not finite for {int((~finite).sum())} of {counted(len(finite), 'image')}. "
            f"{advice}"
        )


def require_finite_weights(weights: Mapping[str, torch.Tensor], *, of: str, advice: str):
    """Raise [`NonFiniteError`] if a tensor of `weights` (a state dict) is not finite, naming the first; `of` and
    `advice` as in [`require_finite_outputs`]."""
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    if bad:
        raise NonFiniteError(f"{counted(len(bad), 'tensor', 'are')} not finite in {of}, first `{bad[0]}`. {advice}")
