"""``thor(...)`` as `mindspore.nn.thor` has it."""

from lightning_thor.mindspore.optimizer import MindSporeThor, thor

__all__ = ["MindSporeThor", "thor"]
