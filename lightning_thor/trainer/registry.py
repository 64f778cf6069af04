"""THOR's strategies by name: ``Trainer(strategy="thor_ddp")``, and what was meant by ``"thor_dpp"``."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any


def register(strategy: Any, registry: Any) -> None:
    """Register a class of THOR's strategies, and let the registry say which of their names was meant.

    Args:
        strategy: a class that has ``strategy_name`` and ``register_strategies``. Registered once.
        registry: ``StrategyRegistry`` of either of Lightning's packages.
    """
    if strategy.strategy_name not in registry:
        strategy.register_strategies(registry)
    registry.available_strategies = lambda: StrategyNames(registry)


class StrategyNames(list[str]):
    """All names in a registry. Lightning's Trainer asks whether they contain the one that it was given."""

    def __contains__(self, name: object) -> bool:
        """Whether this is a name.

        Args:
            name: of a strategy.

        Returns:
            Whether it is one. Lightning's own error follows if it is none.

        Raises:
            ValueError: it is none, but nearly one of THOR's.
        """
        if super().__contains__(name) or not isinstance(name, str):
            return super().__contains__(name)
        ours = [each for each in self if each.startswith("thor_")]
        close = get_close_matches(name, ours, n=1, cutoff=0.85)
        # Not of "my_thor_ddp": someone may ask before registering it.
        if name.startswith("thor") or (close and not any(each in name for each in ours)):
            meant = f"Did you mean {close[0]!r}? " if close else ""
            forms = [each for each in ours if not each.endswith(("_true", "_false"))]
            raise ValueError(
                f"There is no strategy={name!r}. {meant}The names are {', '.join(map(repr, forms))}; those of DDP "
                "may end in _find_unused_parameters_true or _false, as Lightning's."
            )
        return False
