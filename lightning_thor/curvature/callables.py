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

    def _by_class_path(name: str, *arguments: str, such_as: str = "") -> type:
        # What an error of jsonargparse says, and its help.
        words = f"a class with __call__({', '.join(arguments)}), given by class_path{such_as}"
        call = abstractmethod(lambda self, *values: None)
        members = {"__module__": __name__, "__qualname__": name, "__call__": call, "n_arguments": len(arguments)}
        return _ByClassPath(words, (), members)

    StepFn = IntStepFn = _by_class_path("StepFn", "step", such_as=", such as lightning_thor.schedules.Polynomial")
    NumberFn = _by_class_path("NumberFn")
    ParameterFn = _by_class_path("ParameterFn", "parameter")
    BatchFn = _by_class_path("BatchFn", "batch")
