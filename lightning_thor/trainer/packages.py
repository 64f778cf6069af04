"""Lightning is published twice, as ``lightning`` and as ``pytorch_lightning``, with the same classes in each."""

from __future__ import annotations

PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric")


def is_lightnings(one: object, *names: str) -> bool:
    """True if ``one`` is an instance of Lightning's class of one of these ``names``, of whichever package."""
    return any(base.__name__ in names and base.__module__.partition(".")[0] in PACKAGES for base in type(one).__mro__)
