"""Old module paths still import, with a warning; the documentation names what exists."""

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import elmo_jax
from elmo_jax._moved import MOVED

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("old", sorted(old for old, new in MOVED.items() if len(new) == 1))
def test_an_old_module_path_imports_the_new_module_with_a_warning(old):
    sys.modules.pop(f"elmo_jax.{old}", None)
    with pytest.warns(DeprecationWarning, match=re.escape(f"elmo_jax.{old} has moved to {MOVED[old][0]}")):
        module = importlib.import_module(f"elmo_jax.{old}")
    assert module is importlib.import_module(MOVED[old][0])


def test_an_old_module_that_was_split_still_provides_its_names():
    sys.modules.pop("elmo_jax.train", None)
    with pytest.warns(DeprecationWarning, match="elmo_jax.train has moved to elmo_jax.training.step and"):
        train = importlib.import_module("elmo_jax.train")
    for name in ("TrainState", "OptimizerConfig", "evaluate", "make_optimizer", "predict", "train_step"):
        assert getattr(train, name) is getattr(elmo_jax, name)


@pytest.mark.parametrize("name", ["Batch", "BatchStream", "Documents"])
def test_a_module_that_became_a_package_still_provides_its_names(name):
    from elmo_jax import data

    with pytest.warns(DeprecationWarning, match=rf"elmo_jax.data.{name} has moved"):
        assert getattr(data, name) is getattr(elmo_jax, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing


def test_public_names_import_without_warnings():
    names = f"import elmo_jax; [getattr(elmo_jax, name) for name in {elmo_jax.__all__!r}]"
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:elmo_jax", "-c", names], check=True)


def test_names_in_the_readme_exist():
    names = re.findall(r"\belmo_jax(?:\.\w+)+", (ROOT / "README.md").read_text())
    assert names
    for name in names:
        pkgutil.resolve_name(name)
