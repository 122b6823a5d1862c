"""The modules' imports run one way, and files stay short."""

import ast
import graphlib
import operator
import re
from pathlib import Path

import pytest

import elmo_jax

ROOT = Path(__file__).parent.parent
LIBRARY, COMMANDS = (sorted((ROOT / package).glob("*.py")) for package in ("elmo_jax", "experiments"))

# What each module may import of ours; a module that is not here may import nothing local.
ALLOWED = {
    "combiners": {"errors"},
    "text": {"errors"},
    "rows": {"errors", "integrity", "text"},
    "data": {"buckets", "characters", "text"},
    "datasets": {"characters", "data", "errors", "rows", "sample", "text"},
    "cudnn": {"recurrence"},
    "programs": {"recurrence"},
    "fast": {"layout", "recurrence"},
    "persistent": {"cudnn", "fast", "layout", "mesh", "programs", "recurrence"},
    "lstm": {"cudnn", "errors", "fast", "manual", "persistent", "recurrence"},
    "embedders": {"characters", "manual"},
    "softmax": {"manual", "negatives"},
    "bilm": {
        "characters",
        "contiguous",
        "data",
        "embedders",
        "lstm",
        "mesh",
        "negatives",
        "recurrence",
        "softmax",
    },
    "tasks": {
        "bilm",
        "characters",
        "contiguous",
        "data",
        "errors",
        "mesh",
        "negatives",
        "rowwise",
        "text",
        "train",
    },
    "hdf5": {"errors", "integrity"},
    "pretrained": {"bilm", "characters", "data", "embedders", "errors", "hdf5", "integrity", "text"},
    "inference": {"bilm", "characters", "data", "recurrence", "text"},
    "classifier": {"characters", "data", "lstm", "metrics", "text"},
    "integrity": {"errors"},
    "steps": {"errors", "integrity", "processes"},
    "checkpoint": {"errors", "integrity", "processes", "steps"},
    "mesh": {"data", "errors", "processes"},
    "progress": {"processes"},
    "train": {"data", "mesh", "rowwise"},
    "dispatch": {"data", "mesh", "train"},
    "loop": {"checkpoint", "data", "dispatch", "errors", "mesh", "processes", "progress", "train"},
    "processes": {"errors"},
    "exported": {"bilm", "checkpoint", "errors", "integrity", "lstm", "steps", "tasks", "text"},
    "elmo": {"bilm", "errors", "exported", "inference", "lstm", "pretrained", "recurrence", "text"},
    "corpus": {"characters", "data", "errors", "integrity", "text"},
    "contiguous": {"data", "text"},
    "lines": {"errors", "text"},
    "dump": {"combiners", "elmo", "errors", "hdf5", "integrity", "lines", "text"},
    "estimator": {"bilm", "checkpoint", "data", "elmo", "errors", "loop", "mesh", "tasks", "text", "train"},
    "page": {"errors"},
    "vectors": {"errors", "integrity", "text"},
    "svd": {"data", "errors"},
    "sgns": {"data", "text", "rowwise"},
}


def local_imports(path: Path, package: str = "elmo_jax") -> set[str]:
    """The modules of a package that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, _, rest = node.module.partition(".")
            if top == package:
                names |= {rest} if rest else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_modules_import_what_they_may(path):
    assert local_imports(path) == ALLOWED.get(path.stem, set())


@pytest.mark.parametrize("package", ["elmo_jax", "experiments"])
def test_imports_run_one_way(package):
    graph = {path.stem: local_imports(path, package) for path in (ROOT / package).glob("*.py")}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_every_module_is_there_for_who_imports_the_package():
    for path in LIBRARY:
        if path.stem == "__init__":
            continue
        assert getattr(elmo_jax, path.stem).__name__ == f"elmo_jax.{path.stem}"


def test_the_names_in_the_readme_are_there():
    names = re.findall(r"\belmo_jax((?:\.\w+)+)", (ROOT / "README.md").read_text())
    assert len(names) > 5
    for name in names:
        if not name.endswith(".py"):
            operator.attrgetter(name[1:])(elmo_jax)


def test_nothing_imports_experiments():
    for path in LIBRARY:
        assert not re.search(r"^\s*(from|import) experiments", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("path", LIBRARY + COMMANDS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))
