"""The predict command: its inputs, its outputs and its errors."""

import csv
import io
import json

import pytest
from tiny import call

from experiments import downstream, predict

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A finished classifier on word counts, which trains at once."""
    out = tmp_path_factory.mktemp("tfidf") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--features", "tfidf", "--dataset", trained[0].parent / "data", "--output", out]
        assert call(downstream.main, patch, *flags) == 0
    return out


def test_text_csv_and_standard_input_give_the_same_predictions(run, tmp_path, monkeypatch, capsys):
    texts = ["first text, with a comma", "", 'a "quoted" text']
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "body"], *enumerate(texts)])
    capsys.readouterr()
    assert call(predict.main, monkeypatch, run, tmp_path / "in.txt") == 0
    from_text = capsys.readouterr().out
    assert call(predict.main, monkeypatch, run, tmp_path / "in.csv", "--text-column", "body") == 0
    assert capsys.readouterr().out == from_text
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(texts) + "\n"))
    assert call(predict.main, monkeypatch, run, "-") == 0
    assert capsys.readouterr().out == from_text
    header, *rows = csv.reader(io.StringIO(from_text))
    assert header[0] == "label" and header[-1] == "text" and [row[-1] for row in rows] == texts
    assert all(abs(sum(map(float, row[1:-1])) - 1) < 1e-5 for row in rows)
    assert call(predict.main, monkeypatch, run, tmp_path / "in.txt", "--output", tmp_path / "o.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [row[0] for row in rows]
    assert [f"p({name})" for name in lines[0]["probabilities"]] == header[1:-1]


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ({"in.csv": "a,b\n1,2\n"}, ["in.csv"], "has the columns a, b; choose with --text-column"),
        (
            {"in.csv": "a,b\n1,2\n"},
            ["in.csv", "--text-column", "c"],
            "has no column 'c'; its columns are a, b",
        ),
        ({"in.csv": "a,b\n1\n"}, ["in.csv", "--text-column", "b"], "in.csv:2: 1 columns, expected 2"),
        ({"in.csv": ""}, ["in.csv"], "holds no rows"),
        ({"in.txt": "x\n"}, ["in.txt", "--text-column", "b"], "has no effect"),
        ({"in.txt": "x\n"}, ["in.txt", "--output", "o.xml"], "must end in .csv or .jsonl"),
        ({"in.txt": "x\n", "o.csv": "mine"}, ["in.txt", "--output", "o.csv"], "already exists"),
        ({}, ["missing.txt"], "No such file"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_in_one_line(
    files, flags, message, run, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    refused(predict.main, [run, *flags], message)
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_unfinished_run_is_no_classifier(pretrained, text, refused):
    refused(predict.main, [pretrained, text], "holds no text classifier")
