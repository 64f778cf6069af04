"""Which layers are refreshed at which step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Interval = int | Callable[[int], int]


class RefreshSchedule:
    """Every layer at step 0, then each time ``every_n_steps`` applied steps have passed since its last refresh.

    It reads nothing but applied steps and costs, which are the same on every rank, so all ranks decide alike.

    Args:
        every_n_steps: a number, or a function of the step.
        n_layers: how many there are.
        stagger: spread the layers over the interval, so that each step refreshes about its share of them.

    >>> schedule = RefreshSchedule(10, n_layers=2)
    >>> schedule.due(0), schedule.refreshed(0), schedule.due(9), schedule.due(10)
    ((0, 1), None, (), (0, 1))
    """

    def __init__(self, every_n_steps: Interval, n_layers: int, stagger: bool = False) -> None:
        self.every_n_steps = every_n_steps
        self.stagger = stagger
        self.next_steps = [0] * n_layers

    def is_due(self, layer: int, step: int) -> bool:
        return step >= self.next_steps[layer]

    def due(self, step: int) -> tuple[int, ...]:
        """The layers to refresh at ``step``, in order."""
        return tuple(layer for layer, next_step in enumerate(self.next_steps) if step >= next_step)

    def refreshed(self, step: int, costs: Sequence[float] | None = None) -> None:
        """Note that the layers due at ``step`` were refreshed.

        Args:
            step: of now.
            costs: of refreshing each layer, for the first staggered round; None takes them as equal.

        Raises:
            ValueError: the interval function gave something that is not a whole number of at least 1.
        """
        every = self.every_n_steps(step) if callable(self.every_n_steps) else self.every_n_steps
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                f"update_every_n_steps({step}) gave {every!r}; it must give an int, the number of steps until the next "
                "refresh, at least 1."
            )
        due = self.due(step)
        offsets = [every] * len(due)
        if self.stagger and len(due) == len(self.next_steps):
            offsets = spread(costs if costs is not None else [1.0] * len(due), every)
        for layer, offset in zip(due, offsets, strict=True):
            self.next_steps[layer] = step + offset


def spread(costs: Sequence[float], n_steps: int) -> list[int]:
    """In which of the next ``n_steps`` steps (1, 2, ...) each cost is to fall, so that none has much more than others.

    The largest first, each to the step that has least so far.

    >>> spread([4.0, 1.0, 3.0, 2.0], 2)
    [1, 1, 2, 2]
    """
    loads = [0.0] * n_steps
    steps = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        least = min(range(n_steps), key=loads.__getitem__)
        loads[least] += costs[index]
        steps[index] = least + 1
    return steps
