"""Values of options, checked before anything is computed with them."""

import numbers
from typing import Any


def require_whole(name: str, value: Any, *, least: int) -> int:
    """The value of an option as `int`.

    Raises:
        ValueError: naming option and value, if it is no whole number or below `least`.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}={value!r}` must be a whole number, at least {least}.")
    return int(value)
