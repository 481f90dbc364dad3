"""Options of sampling, as plain records that import no JAX."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How networks are guided.

    Attributes:
        scale: Scale of classifier-free guidance. A number runs the conditional and the
            unconditional half; None runs the conditional one alone, at half the cost. Or a list
            with one entry per network: None, a number, or N numbers, one per step; in a step whose
            own scale is 1 the unconditional half is not run.
        interval: Guide only at noise levels sigma / alpha above the first number, up to the second;
            elsewhere guidance costs nothing.
        channels: How many of the first channels are guided; None for the card's number.
        rescale: Rescaled guidance's phi, 0 (none) to 1.
        weak_scale: Scale of autoguidance, in which the first network guides all others; None
            without it. It comes on top of classifier-free guidance.
    """

    scale: Any = None
    interval: Any = None
    channels: int | None = None
    rescale: float | int = 0.0
    weak_scale: float | int | None = None
