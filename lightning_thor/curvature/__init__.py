"""`Curvature`: observe, average, refresh, precondition, in this order, and its state. Nothing here knows a Trainer."""

from lightning_thor.curvature.curvature import Curvature

__all__ = ["Curvature"]
