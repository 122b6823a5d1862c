"""Console command: ``elmo-jax COMMAND ...`` runs a command of the experiments package."""

import difflib
import importlib
import importlib.util
import os
import sys
from pathlib import Path

COMMANDS = {
    "pretrain": "pre-train a bidirectional language model",
    "downstream": "train and evaluate a classifier on a model's layers or on word vectors",
    "predict": "classify new texts with a trained classifier",
    "embed": "write the layers of every token of a text into an HDF5 file",
    "evaluate": "measure a model's perplexity on texts, or check a model against expected values",
    "vectors": "make word vectors by SVD or skip-gram",
    "neighbours": "show which occurrences of a word each layer finds similar",
    "compare": "run pre-training and all classifiers, and write a page of results",
    "benchmark": "time this library against other implementations",
    "soak": "check that a long run keeps its memory constant",
}


def main() -> int:
    """Run the command named by the first argument and return its exit code."""
    start = "python -m elmo_jax" if os.path.basename(sys.argv[0]) == "__main__.py" else "elmo-jax"
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {start} COMMAND [OPTIONS]\n\ncommands (see {start} COMMAND --help):")
        print("\n".join(f"  {command:<12}{line}" for command, line in COMMANDS.items()))
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else f"see {start} --help"
        print(f"error: unknown command {name}; {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"{start} {name}", *args]  # the command names itself so in its messages
    _load_experiments()
    package = name in ("compare", "benchmark")
    module = importlib.import_module(f"experiments.{name}.__main__" if package else f"experiments.{name}")
    return module.main()


def _load_experiments() -> None:
    """Load the package beside this one, even if the current folder has another of that name."""
    folder = Path(__file__).parents[1] / "experiments"
    spec = importlib.util.spec_from_file_location("experiments", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules["experiments"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["experiments"])


if __name__ == "__main__":
    sys.exit(main())
