"""Which layers to leave in float32, where quantising all of them costs too much."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Search:
    float_layers: tuple[str, ...] = ()
    """The choice: the fewest that reach the target, or the best that was found in the time."""
    error: float = 0.0
    error_of_all_int8: float = 0.0
    layers: int = 0
    """How many there are."""
    measured: int = 0
    """Layers whose own part in the error was measured before the time was over."""
    tried: dict[int, float] = field(default_factory=dict)
    """Number of layers left in float32 -> error."""


def choose_float_layers(
    layers: Sequence[str],
    error: Callable[[Sequence[str]], float],
    target: float,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """Measure each layer alone, then the worst together.

    `error(float_layers)` quantises all others and measures.

    First every layer is left out by itself: the less error remains, the more that layer causes. Then the 1,
    2, 4, ... worst stay in float32 together, up to half of the layers: with more, little would be gained.
    Two thirds of the time are for the first part.
    """
    start = clock()
    search = Search(layers=len(layers))
    search.error = search.error_of_all_int8 = search.tried[0] = error(())
    if search.error <= target or not layers:
        return search
    alone: dict[str, float] = {}
    for layer in layers:
        if clock() - start > seconds * 2 / 3:
            break
        alone[layer] = error((layer,))
    search.measured = len(alone)
    worst = sorted(alone, key=lambda layer: alone[layer])
    count = 1
    while count <= min(len(worst), (len(layers) + 1) // 2) and search.error > target:
        if count > 1 and clock() - start > seconds:
            break
        chosen = tuple(worst[:count])
        search.tried[count] = alone[worst[0]] if count == 1 else error(chosen)
        if search.tried[count] < search.error:
            search.float_layers, search.error = chosen, search.tried[count]
        count *= 2
    return search
