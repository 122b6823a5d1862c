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


@pytest.mark.filterwarnings("default:.*texts are blank")
def test_text_csv_and_standard_input_give_the_same_predictions(run, tmp_path, monkeypatch, capsys):
    texts = ["first text, with a comma", "", 'a "quoted" text']
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "body"], *enumerate(texts)])
    capsys.readouterr()
    assert call(predict.main, monkeypatch, run, tmp_path / "in.txt") == 0
    from_text, err = capsys.readouterr()
    assert "1 texts are blank; their classes mean nothing" in err
    assert call(predict.main, monkeypatch, run, tmp_path / "in.csv", "--text-column", "body") == 0
    assert capsys.readouterr().out == from_text
    with (tmp_path / "in2.csv").open("w", newline="") as file:  # no header, a blank row, semicolons
        csv.writer(file, delimiter=";").writerows([[0, texts[0]], [], *enumerate(texts[1:], 1)])
    assert call(predict.main, monkeypatch, run, tmp_path / "in2.csv", "--text-column", "2") == 0
    assert capsys.readouterr().out == from_text
    stream = io.BytesIO(("\n".join(texts) + "\n").encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stream))
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
            "no column 'c' in 'a', 'b'; give a name, or a number from 1 to 2",
        ),
        ({"in.csv": "a,b\n1\n"}, ["in.csv", "--text-column", "b"], "in.csv:2: 1 columns, expected 2"),
        ({"in.csv": ""}, ["in.csv"], "holds no rows"),
        ({"in.txt": "x\n"}, ["in.txt", "--text-column", "b"], "has no effect"),
        ({"in.txt": "x\n"}, ["in.txt", "--output", "o.xml"], "must end in .csv or .jsonl"),
        ({"in.txt": "x\n", "o.csv": "mine"}, ["in.txt", "--output", "o.csv"], "already exists"),
        ({}, ["missing.txt"], "no such file"),
        ({}, ["."], "no such file"),
        ({"in.txt": ""}, ["in.txt"], "holds no text"),
        ({"in.txt": "x\n"}, ["in.txt", "--output", "none/o.csv"], "no such folder as none"),
        ({"in.csv": "a,a\n1,2\n"}, ["in.csv", "--text-column", "a"], "more than one column 'a'"),
        ({"in.csv": "a,b\n1,2\n"}, ["in.csv", "--text-column", "3"], "no column '3' in 'a', 'b'; give"),
        ({"IN.CSV": "a;b\n1;2\n"}, ["IN.CSV"], "has the columns a, b"),
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


def test_standard_input_that_is_not_utf_8_is_refused(run, monkeypatch, refused):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"good\nbad \xff\n")))
    refused(predict.main, [run, "-"], "-:2: byte 0xff is not UTF-8")


def test_unfinished_run_is_no_classifier(pretrained, text, refused):
    refused(predict.main, [pretrained, text], "holds no text classifier")
