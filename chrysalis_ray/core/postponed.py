"""Modules that a trial or a worker imports and never uses, loaded only if somebody uses them after all.

`ray.tune` and `ray.train` import pandas for tables of results and `ray.data` for data sets: a third of a second and 40 MiB in
each of a population's processes, which hand results on and write positions down. While they are imported, an empty module
stands in for each of these; whoever holds it and asks for something in it gets the real one, loaded then. Afterwards the
stand-ins are gone from `sys.modules`, and an `import pandas` is what it always was.
(The standard library's LazyLoader does not do: it loads at the second `import` of a module, and Ray has many.)
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Early = tuple[str, ...]

# module -> what is named of it while others are imported (in annotations, say): each gets a stand-in of its own
POSTPONED: dict[str, Early] = {"pandas": ("DataFrame",), "ray.data": ("Dataset",)}
# The same for models that are read and trained as they are, without torch's compiler: transformers prepares
# for the compiler and for losses of object detection. torch must be imported already. The stand-in of a name with "@" leaves
# functions unmarked that the compiler should know, so this is not for who compiles.
PLAIN_MODELS: dict[str, Early] = {
    "torch._dynamo": ("@disable", "@assume_constant_result", "@allow_in_graph"),
    "torch._dynamo._trace_wrapped_higher_order_op": ("TransformGetItemToIndex",),
    "scipy.optimize": ("linear_sum_assignment",),
}


@contextmanager
def postponed(modules: Mapping[str, Early] = POSTPONED) -> Iterator[None]:
    """Inside this block, what imports one of these modules gets a stand-in, unless it is loaded already or not installed."""
    standing: dict[str, StandIn] = {}
    for name in [name for name in modules if name not in sys.modules]:
        package = standing.get(name.rpartition(".")[0])  # to look into it would load it
        spec = package.__spec__ if package else importlib.util.find_spec(name)
        if spec is not None:
            standing[name] = StandIn(name, modules[name], spec)
    sys.modules.update(standing)
    finder = PartsOfPostponed()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, stand_in in standing.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


class StandIn(types.ModuleType):
    """Stands in for a module that is not loaded yet."""

    def __init__(self, name: str, early: Early, spec: importlib.machinery.ModuleSpec) -> None:
        super().__init__(name)
        self.__spec__ = spec  # some look whether it is installed
        self.__path__: list[str] = []
        for part in early:
            setattr(self, part.removeprefix("@"), unmarked if part[0] == "@" else ClassOf(part, (), {"__module__": name}))
        package, _, own = name.rpartition(".")
        if package in sys.modules:
            setattr(sys.modules[package], own, self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module by those who look through all of them
            raise AttributeError(name)
        return getattr(load(self.__name__, self), name)


def unmarked(function: Any = None, *values: Any, **named: Any) -> Any:
    """In the place of a decorator that only marks functions, or of what makes one."""
    return function if function is not None else unmarked


class ClassOf(type):
    """The class of a class, or of a function, that stands in for one of a module that is not loaded yet."""

    def __call__(cls, *values: Any, **named: Any) -> Any:
        return getattr(load(cls.__module__), cls.__name__)(*values, **named)

    def __instancecheck__(cls, value: Any) -> bool:
        module = sys.modules.get(cls.__module__)  # while it is not loaded, nothing can be of its classes
        return module is not None and not isinstance(module, StandIn) and isinstance(value, getattr(module, cls.__name__))

    def __getattr__(cls, name: str) -> Any:
        return getattr(getattr(load(cls.__module__), cls.__name__), name)


class PartsOfPostponed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Whoever imports a part of a module that is stood in for needs the real one: it is loaded, and the part with it.

    What was loaded on the way must not be executed again, hence a specification of our own while the import ends.
    """

    def __init__(self) -> None:
        self.true: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = fullname.rpartition(".")[0]
        if not isinstance(sys.modules.get(package), StandIn):
            return None
        load(package)
        module = importlib.import_module(fullname)
        self.true[fullname] = module.__spec__
        module.__spec__ = importlib.machinery.ModuleSpec(fullname, self)
        return module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.true.pop(module.__name__)


def load(name: str, stand_in: types.ModuleType | None = None) -> types.ModuleType:
    """The real module; who holds its stand-in finds everything there too."""
    stand_in = stand_in or sys.modules.get(name)
    if isinstance(sys.modules.get(name), StandIn):
        del sys.modules[name]
    module = importlib.import_module(name)
    if isinstance(stand_in, StandIn):
        vars(stand_in).update(vars(module))
    return module
