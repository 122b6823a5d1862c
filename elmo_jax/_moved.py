"""Deprecated module paths, names and arguments, which warn until the next release."""

import functools
import importlib
import operator
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

MOVED: dict[str, str | tuple[str, ...]] = {  # several new modules where the old one was split
    "bilm": "elmo_jax.models.bilm",
    "buckets": "elmo_jax.data.batching",
    "characters": "elmo_jax.data.characters",
    "checkpoint": "elmo_jax.training.checkpoint",
    "classifier": "elmo_jax.models.classifier",
    "combiners": "elmo_jax.models.combiners",
    "contiguous": "elmo_jax.data.batching",
    "corpus": "elmo_jax.data.corpus",
    "datasets": "elmo_jax.data.csv_dataset",
    "dispatch": "elmo_jax.training.step",
    "dump": "elmo_jax.embed_file",
    "embedders": "elmo_jax.models.embedders",
    "estimator": "elmo_jax.sklearn",
    "exported": "elmo_jax.pretrained.folder",
    "fast": "elmo_jax.ops.lstm",
    "hdf5": "elmo_jax.storage.hdf5",
    "inference": "elmo_jax.elmo",
    "integrity": "elmo_jax.storage.files",
    "layout": "elmo_jax.ops.lstm",
    "lines": "elmo_jax.data.text",
    "loop": "elmo_jax.training.loop",
    "lstm": "elmo_jax.models.lstm",
    "mesh": "elmo_jax.parallel",
    "metrics": "elmo_jax.training.evaluate",
    "negatives": "elmo_jax.ops.softmax",
    "page": "experiments.common.report",
    "persistent": "elmo_jax.ops.lstm_pallas",
    "processes": "elmo_jax.parallel",
    "programs": "elmo_jax.ops.lstm_pallas",
    "progress": "elmo_jax.training.loop",
    "recurrence": "elmo_jax.ops.lstm",
    "report": "experiments.common.report",
    "rows": "elmo_jax.data.csv_dataset",
    "rowwise": "elmo_jax.training.optimizers",
    "sample": "elmo_jax.data.sample_corpus",
    "sgns": "elmo_jax.baselines.sgns",
    "softmax": "elmo_jax.ops.softmax",
    "steps": "elmo_jax.training.checkpoint",
    "svd": "elmo_jax.baselines.svd",
    "tasks": "elmo_jax.training.objectives",
    "text": "elmo_jax.data.text",
    "train": (
        "elmo_jax.training.step",
        "elmo_jax.training.evaluate",
        "elmo_jax.training.optimizers",
        "elmo_jax.config",
    ),
    "vectors": "elmo_jax.baselines.word_vectors",
}


class _MovedModules(MetaPathFinder, Loader):
    """Importer that replaces an old module by the new one."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "elmo_jax" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.rpartition(".")[2]]
        if isinstance(new, str):
            _warn(module.__name__, new)
            sys.modules[module.__name__] = importlib.import_module(new)
            return
        _warn(module.__name__, " and ".join(new))
        for target in map(importlib.import_module, new):
            vars(module).update((name, getattr(target, name)) for name in dir(target) if name[0] != "_")


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} has moved to {new}; the old path ends with the next release", DeprecationWarning, 3)


def renamed_arguments(**new_names: str) -> Callable[[F], F]:
    """Return a decorator that accepts old argument names, with a warning, until the next release.

    Instances of a decorated class keep attributes of the old names.
    """

    def decorate(decorated: F) -> F:
        cls: Any = decorated if isinstance(decorated, type) else None
        function = decorated if cls is None else cls.__init__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in new_names.keys() & kwargs.keys():
                warnings.warn(f"{old} is now {new_names[old]}", DeprecationWarning, 2)
                kwargs[new_names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        if cls is None:
            return cast(F, call)
        cls.__init__ = call
        for old, new in new_names.items():
            setattr(cls, old, property(operator.attrgetter(new)))
        return cls

    return decorate


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """Return a method that warns and calls the one that replaced it."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is now {new}", DeprecationWarning, 2)
        return getattr(self, new)(*args, **kwargs)

    return call


def old_names(package: str, module: str, names: set[str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package that was a module and still provides its names."""

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{module}.{name}")
        return getattr(importlib.import_module(module), name)

    return get


sys.meta_path.append(_MovedModules())
