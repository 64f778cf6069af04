"""Which steps refresh the curvature."""

from __future__ import annotations

from collections.abc import Callable

Interval = int | Callable[[int], int]


class RefreshSchedule:
    """Due at step 0, then each time ``every_n_steps`` (a number, or a function of the step) applied steps have passed.

    It reads nothing but applied steps, which are the same on every rank, so all ranks decide alike.

    >>> schedule = RefreshSchedule(10)
    >>> schedule.is_due(0), schedule.refreshed(0), schedule.is_due(9), schedule.is_due(10)
    (True, None, False, True)
    """

    def __init__(self, every_n_steps: Interval) -> None:
        self.every_n_steps = every_n_steps
        self.next_step = 0

    def is_due(self, step: int) -> bool:
        return step >= self.next_step

    def refreshed(self, step: int) -> None:
        """Note that the curvature was refreshed at ``step``.

        Raises:
            ValueError: the interval function gave something that is not a whole number of at least 1.
        """
        every = self.every_n_steps(step) if callable(self.every_n_steps) else self.every_n_steps
        if not isinstance(every, int) or every < 1:
            raise ValueError(
                f"update_every_n_steps({step}) gave {every!r}; it must give an int, the number of steps until the next "
                "refresh, at least 1."
            )
        self.next_step = step + every
