"""Functions as options: any from Python, but from a configuration file only classes whose instances can be called."""

from __future__ import annotations

import inspect
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any


class _ByClassPath(ABCMeta):
    """Of abstract classes that are the base of every class whose instances can be called in a certain way.

    It is for configuration files: there jsonargparse takes the import path of any function for a ``Callable``, and the
    training would call ``os._exit`` with the step. For a class it takes a ``class_path`` of a subclass alone, or an
    importable instance, of which these have none. From Python they are the ``Callable`` that type checkers see.
    """

    n_arguments: int

    def __subclasscheck__(cls, other: type) -> bool:
        call = getattr(other, "__call__", None)  # noqa: B004  # of the class, for its instances
        # Written in Python: not functools.partial, nor a metaclass, whose instances would be called as classes.
        if not isinstance(call, FunctionType) or issubclass(other, type):
            return False
        try:
            inspect.signature(call).bind(*range(1 + cls.n_arguments))
        except TypeError:
            return False
        return True

    def __instancecheck__(cls, instance: object) -> bool:
        return False


if TYPE_CHECKING:
    StepFn = Callable[[int], float]
    IntStepFn = Callable[[int], int]
    NumberFn = Callable[[], Any]
    ParameterFn = Callable[[Any], bool]
    BatchFn = Callable[[Any], Any]
else:

    class StepFn(metaclass=_ByClassPath):
        """A function of the step."""

        n_arguments = 1

        @abstractmethod
        def __call__(self, step: int) -> float:
            """What is due at this step."""

    class NumberFn(metaclass=_ByClassPath):
        """A function without arguments."""

        n_arguments = 0

        @abstractmethod
        def __call__(self) -> float:
            """What it is now."""

    class ParameterFn(metaclass=_ByClassPath):
        """Whether something holds for a parameter."""

        n_arguments = 1

        @abstractmethod
        def __call__(self, parameter: Any) -> bool:
            """Of this one."""

    class BatchFn(metaclass=_ByClassPath):
        """A number of a batch of data."""

        n_arguments = 1

        @abstractmethod
        def __call__(self, batch: Any) -> float:
            """Of this one."""

    # The names are what an error of jsonargparse says, and its help.
    StepFn.__name__ = "a class with __call__(step), given by class_path, such as lightning_thor.schedules.Polynomial"
    NumberFn.__name__ = "a class with __call__(), given by class_path"
    ParameterFn.__name__ = "a class with __call__(parameter), given by class_path"
    BatchFn.__name__ = "a class with __call__(batch), given by class_path"
    IntStepFn = StepFn
