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

_OLD_MODULES = {  # by the new module; the old module "train" was split
    "elmo_jax.baselines.sgns": "sgns",
    "elmo_jax.baselines.svd": "svd",
    "elmo_jax.baselines.word_vectors": "vectors",
    "elmo_jax.data.batching": "buckets contiguous",
    "elmo_jax.data.characters": "characters",
    "elmo_jax.data.corpus": "corpus",
    "elmo_jax.data.csv_dataset": "datasets rows",
    "elmo_jax.data.sample_corpus": "sample",
    "elmo_jax.data.text": "lines text",
    "elmo_jax.elmo": "inference",
    "elmo_jax.embed_file": "dump",
    "elmo_jax.models.bilm": "bilm",
    "elmo_jax.models.classifier": "classifier",
    "elmo_jax.models.combiners": "combiners",
    "elmo_jax.models.embedders": "embedders",
    "elmo_jax.models.lstm": "lstm",
    "elmo_jax.ops.lstm": "fast layout recurrence",
    "elmo_jax.ops.lstm_pallas": "persistent programs",
    "elmo_jax.ops.softmax": "negatives softmax",
    "elmo_jax.parallel": "mesh processes",
    "elmo_jax.pretrained.folder": "exported",
    "elmo_jax.sklearn": "estimator",
    "elmo_jax.storage.files": "integrity",
    "elmo_jax.storage.hdf5": "hdf5",
    "elmo_jax.training.checkpoint": "checkpoint steps",
    "elmo_jax.training.step": "dispatch train",
    "elmo_jax.training.evaluate": "metrics train",
    "elmo_jax.training.optimizers": "rowwise train",
    "elmo_jax.training.loop": "loop progress",
    "elmo_jax.training.objectives": "tasks",
    "elmo_jax.config": "train",
    "experiments.common.report": "page report",
}
MOVED: dict[str, list[str]] = {}
for _new, _old in _OLD_MODULES.items():
    for _name in _old.split():
        MOVED.setdefault(_name, []).append(_new)


class _MovedModules(MetaPathFinder, Loader):
    """Importer that replaces an old module by the new one."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == "elmo_jax" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__.rpartition(".")[2]]
        _warn(module.__name__, " and ".join(new))
        targets = [importlib.import_module(name) for name in new]
        if len(targets) == 1:
            sys.modules[module.__name__] = targets[0]
        for target in targets:
            vars(module).update((name, value) for name, value in vars(target).items() if name[0] != "_")


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


def old_names(package: str, module: str, names: str) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package that was a module and still provides its names."""

    def get(name: str) -> Any:
        if name not in names.split():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(f"{package}.{name}", f"{module}.{name}")
        return getattr(importlib.import_module(module), name)

    return get


sys.meta_path.append(_MovedModules())
