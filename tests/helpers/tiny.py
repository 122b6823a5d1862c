"""The commands on a data set of a few words, in this process."""

import json
import sys

TINY = "--embedding 4 --cells 4 --batch-size 8 --epochs 2 --min-count 1 --steps-per-call 2".split()  # noqa: SIM905
SMALL = "--hidden 4 --epochs 1 --batch-size 8 --classifier-layers 1".split()  # noqa: SIM905


def call(main, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, args)])
    return main()


def write_corpus(folder, last=None):
    """Two classes; `last` takes the place of the test part's last row."""
    folder.mkdir(exist_ok=True)
    words = ("goal team match", "rate bank profit")
    rows = [f"{'sb'[i % 2]},the {words[i % 2]} of {i % 7}" for i in range(40)]
    (folder / "train.csv").write_text("\n".join(rows))
    (folder / "test.csv").write_text("\n".join([*rows[:9], last or rows[9]]))


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
