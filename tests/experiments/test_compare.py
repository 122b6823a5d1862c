"""The whole comparison on a tiny data set: what it redoes, what it refuses, and what it holds fast."""

import json
import re
import shutil

import archives
import filelock
import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny import call, write_corpus

from elmo_jax.data.csv_dataset import DataConfig, load_dataset
from elmo_jax.storage.files import read_config
from experiments import downstream, pretrain
from experiments.common.config import SourceConfig
from experiments.compare import __main__ as compare, results, results as measured
from experiments.compare.stages import METHODS, CompareConfig, Comparison, Origins

pytestmark = pytest.mark.usefixtures("standard_promotion")
LM = "--embedding 4 --cells 4 --epochs 1"
HEAD = "--hidden 4 --epochs 1 --classifier-layers 1 --batch-size 16"


def flags(folder, lm=LM, vectors="--dimensions 4 --epochs 1"):
    given = ["--dataset", folder / "data", "--min-count", "1", "--output", folder / "out"]
    given += [f"--pretrain={lm}", f"--vectors={vectors}"]
    return [*given, f"--downstream={HEAD}"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished comparison and its data set; its tests take copies of it."""
    folder = tmp_path_factory.mktemp("made")
    write_corpus(folder / "data", last="s,the goal of 0")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch, capsys):
    """A finished comparison, the working directory."""
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # for what is traced comes again
    monkeypatch.chdir(made)
    if not (made / "out").exists():
        with jax.numpy_dtype_promotion("standard"):
            assert call(compare.main, monkeypatch, *flags(compare.Path())) == 0, capsys.readouterr().err
        capsys.readouterr()
    # The first comparison's pictures are drawn; those after it are only counted.
    monkeypatch.setattr(Figure, "savefig", lambda self, path: compare.Path(path).write_bytes(b"\x89PNG"))
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return compare.Path()


def lines(monkeypatch, capsys, args):
    """What is said of each stage."""
    told = r"\[\d/[78]\] (.*): (runs anew|runs|finished before)"
    said = (re.match(told, line) for line in _said(monkeypatch, capsys, args))
    return {match[1]: match[2] for match in said if match}


def of(made, kind):
    return {name for name, said in made.items() if said == kind}


ELMO = {f"{name} seed 0" for name in ("function", "trainable", "frozen")}
STATIC = {"svd seed 0", "sgns seed 0"}
SOURCES = {"pretrain", "svd", "sgns"}


def _folder(method):
    return f"{METHODS[method][0][1]}-seed0"


def test_it_makes_the_page_and_redoes_only_what_is_not_finished(folder, monkeypatch, capsys):
    out = folder / "out"
    page, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "AG News" not in page  # whose figures the report's are
    for method in METHODS:
        test = json.loads((out / _folder(method) / "results.json").read_text())["test"]
        assert f"| {method} | test | {test['accuracy']:.4f} | {test['f1']:.4f} |" in page
    assert html.count("data:image/png;base64,") == 3 + 15 and 'src="http' not in html

    stopped = out / "svd-seed0"  # as if it had been interrupted
    (stopped / "results.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")}
    for picture in out.glob("*-seed0/*.png"):
        picture.unlink()  # the page needs the figures alone
    said = lines(monkeypatch, capsys, flags(folder))
    assert of(said, "runs") == {"svd seed 0"} and len(of(said, "finished before")) == 7
    assert (stopped / "results.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_fine_tuning_is_for_the_language_model_alone(tmp_path):
    config = CompareConfig(downstream="--finetune")
    comparison = Comparison(config, config.data, tmp_path, Origins())
    tuned = {method: comparison.classifier(method, 0).settings.source.finetune for method in METHODS}
    assert tuned == {method: method.startswith("ELMo") for method in METHODS}


def test_a_comparison_may_be_moved_with_its_data(folder, monkeypatch, capsys):
    (folder / "out").rename(folder / "moved")
    (folder / "data").rename(folder / "texts")
    args = flags(folder)
    args[1], args[5] = (folder / "texts").absolute(), (folder / "moved").absolute()
    said = lines(monkeypatch, capsys, args)
    assert of(said, "finished before") == SOURCES | ELMO | STATIC


def test_other_words_and_other_classes_are_other_texts(folder):
    config = DataConfig(str(folder / "data"), min_count=1)
    first = load_dataset(config).digest
    for old, new in (("team", "teem"), ("s,", "sport,")):
        for name in ("train.csv", "test.csv"):
            path = folder / "data" / name
            path.write_text(path.read_text().replace(old, new))
        assert load_dataset(config).digest != first
        first = load_dataset(config).digest


def test_a_stage_that_made_nothing_may_have_other_flags(folder, monkeypatch, capsys):
    wrong = flags(folder, vectors="--dimensions 4 --epochs 1 --exponent 1")
    for name in ("results.json", "metrics.jsonl", "vectors.npz", "vectors.txt"):  # it failed
        (folder / "out" / "svd" / name).unlink()
    said = lines(monkeypatch, capsys, wrong)
    assert of(said, "runs anew") >= {"svd"} and "sgns" in of(said, "finished before")


def _figures(run):
    """A run's epochs, but for their times."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in timed} for r in measured.read_records(run)]


def test_what_was_made_from_what_has_changed_is_made_anew(folder, monkeypatch, capsys):
    loads = []

    def load(*args, **more):
        loads.append(args)
        return load_dataset(*args, **more)

    monkeypatch.setattr("experiments.compare.stages.load_dataset", load)
    said = lines(monkeypatch, capsys, flags(folder, f"{LM} --save-every 7 --steps-per-call 2"))
    assert of(said, "finished before") == SOURCES | ELMO | STATIC
    assert len(loads) == 1  # not once a stage

    longer = LM.replace("--epochs 1", "--epochs 3")
    said = lines(monkeypatch, capsys, flags(folder, longer))
    assert of(said, "runs anew") == {"pretrain"} | ELMO  # whose schedule spans all epochs
    new = ["--preset", "report", "--dataset", "data", "--min-count", "1", "--output", "new", *longer.split()]
    assert call(pretrain.main, monkeypatch, *new) == 0
    new = ["--preset", "report", "--pretrained", "new", "--output", "one", *HEAD.split()]
    assert call(downstream.main, monkeypatch, *new) == 0
    capsys.readouterr()
    for stage, fresh in (("pretrain", "new"), ("trainable-seed0", "one")):
        assert _figures(folder / "out" / stage) == _figures(folder / fresh)
    wider = folder / "out" / "svd" / "vectors.npz"
    shutil.copy(folder / "out" / "sgns" / "vectors.npz", wider)  # as if they had been made again
    (folder / "out" / "svd" / "results.json").touch()
    said = lines(monkeypatch, capsys, flags(folder, longer))
    assert of(said, "runs anew") == {"svd seed 0"} and len(of(said, "finished before")) == 7

    write_corpus(folder / "data", last="s,the goal of 6")
    said = lines(monkeypatch, capsys, flags(folder, longer))
    assert of(said, "runs anew") == SOURCES | ELMO | STATIC
    digest = Origins().texts(DataConfig(dataset="data", min_count=1))
    assert {read_config(path.parent)["texts"] for path in folder.glob("out/*/results.json")} == {digest}
    assert len(measured.read_records(folder / "out" / "pretrain")) == 3
    assert of(lines(monkeypatch, capsys, flags(folder, longer)), "finished before") == SOURCES | ELMO | STATIC


def test_a_language_model_that_is_given_may_change_too(folder, monkeypatch, capsys, refused):
    (folder / "out" / "pretrain").rename("lm")
    shutil.rmtree(folder / "out" / "trainable-seed0")
    lm = ["--dataset", "data", "--min-count", "1", "--output", "lm", *LM.split()]
    given = ["--pretrained", "lm", *flags(folder)[4:6], *flags(folder)[7:]]
    said = lines(monkeypatch, capsys, given)
    assert of(said, "runs") == {"trainable seed 0"} and len(of(said, "finished before")) == 6
    assert call(pretrain.main, monkeypatch, *lm, "--overwrite", "--seed", "1") == 0
    capsys.readouterr()
    said = [line for line in _said(monkeypatch, capsys, given) if "runs" in line]
    assert len(said) == 3 and all("since what it builds on was made anew" in line for line in said)
    write_corpus(folder / "data", last="s,the goal of 6")
    refused(compare.main, given, "lm: was made from other texts than its data set holds now; make it anew")


def _said(monkeypatch, capsys, args):
    assert call(compare.main, monkeypatch, *args) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def edit(path, **changes):
    """A JSON object's members changed, by their names; a part's with its name before."""
    made = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, below = name.partition("__")
        if below:
            made[part][below] = value
        else:
            made[part] = value
    path.write_text(json.dumps(made))


def shifted(path):
    arrays = dict(np.load(path))
    arrays["test"] = 1 - arrays["test"]
    np.savez(path, **arrays)


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(1))


SVD, FIRST, SEEN = "svd-seed0/results.json", "pretrain/metrics.jsonl", "trainable-seed0/metrics.jsonl"
NPZ = "svd-seed0/predictions.npz"
DAMAGES = {
    "results that are a list": (
        SVD,
        lambda p: p.write_text("[]"),
        f"cannot be read (not an object); remove out/{SVD}, and finish that run again",
    ),
    "results of nothing": (SVD, lambda p: p.write_text("{}"), "missing required field"),
    "another accuracy": (SVD, lambda p: edit(p, test__accuracy=0.99), "test's accuracy is not that of pred"),
    "another F1": (SVD, lambda p: edit(p, train__f1=float("nan")), "train's f1 is not that of predictions"),
    "a matrix of another shape": (
        SVD,
        lambda p: edit(p, test__confusion_matrix=[[1, 2]]),
        "test's confusion_matrix is not that",
    ),
    "a class more": (SVD, lambda p: edit(p, classes=["s", "b", "c"]), "confusion_matrix is not that"),
    "a class less": (SVD, lambda p: edit(p, classes=["s"]), "train is not one of 1 classes"),
    "seconds of text": (SVD, lambda p: edit(p, seconds="1"), "Expected `float`, got `str`"),
    "endless seconds": (SVD, lambda p: edit(p, seconds=float("inf")), "its times are no such numbers"),
    "pre-training of nothing": ("pretrain/results.json", lambda p: p.write_text("{}"), "missing required"),
    "another best epoch": (
        "pretrain/results.json",
        lambda p: edit(p, perplexity=1.5),
        "its best epoch is not",
    ),
    "no epochs": (FIRST, lambda p: p.write_text(""), "does not hold every epoch"),
    "an epoch of nothing": (FIRST, lambda p: p.write_text("{}\n"), "missing required field"),
    "an epoch's text": (FIRST, lambda p: p.write_text("x\n"), "cannot be read"),
    "a better perplexity": (FIRST, lambda p: edit(p, perplexity=1.5), "is not its directions' mean"),
    "a perplexity of nothing": (FIRST, lambda p: edit(p, perplexity_forward=0), "not above 0 and finite"),
    "an epoch less": (SEEN, lambda p: p.write_text(""), "does not hold 1 epochs"),
    "another epoch": (SEEN, lambda p: edit(p, epoch=2), "does not hold 1 epochs"),
    "an accuracy above 1": (SEEN, lambda p: edit(p, val_accuracy=1.5), "out of bounds"),
    "no lambdas": (SEEN, lambda p: edit(p, lambdas=None), "has not the lambdas of results.json"),
    "other lambdas": (
        "trainable-seed0/results.json",
        lambda p: edit(p, lambdas=[9.0, 0.1, 0.1]),
        "lambdas are those of no epoch",
    ),
    "empty predictions": (NPZ, lambda p: p.write_bytes(b""), "cannot be read"),
    "garbage": (NPZ, lambda p: p.write_bytes(b"garbage"), "cannot be read"),
    "encrypted": (
        NPZ,
        lambda p: p.write_bytes(archives.damaged(p.read_bytes())["encrypted"]),
        "cannot be read",
    ),
    "half of them": (NPZ, lambda p: p.write_bytes(p.read_bytes()[:300]), "cannot be read"),
    "predictions of nothing": (NPZ, lambda p: np.savez(p, a=np.zeros(1)), "cannot be read"),
    "one array": (NPZ, one_array, "cannot be read"),
    "other predictions": (NPZ, shifted, "test's accuracy is not that of predictions.npz"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_are_damaged_or_contradict_each_other(name, folder, refused):
    which, damage, said = DAMAGES[name]
    damage(folder / "out" / which)
    refused(compare.main, flags(folder), said)


def test_the_remedy_for_damaged_files_is_one(folder, monkeypatch, capsys):
    for name in ("sgns-seed0/predictions.npz", SEEN, FIRST):
        path = folder / "out" / name
        path.write_text("x\n")
        path.with_name("results.json").unlink()
    said = lines(monkeypatch, capsys, flags(folder))
    assert of(said, "runs") == {"sgns seed 0", "trainable seed 0", "pretrain"}


@pytest.mark.parametrize(
    "more", [["--labels", "0.5"], ["--untrained"], ["--features", "svd", "--labels", "0.5"]]
)
def test_origins_are_what_a_classifier_records(more, folder, monkeypatch, capsys):
    args = ["--seed", "3", "--epochs", "1", *more]
    args += ["--vectors", "out/svd"] if "svd" in more else ["--pretrained", "out/pretrain"]
    args += ["--hidden", "4", "--classifier-layers", "1", "--batch-size", "16"]
    assert call(downstream.main, monkeypatch, *args, "--output", "one") == 0
    saved = read_config(folder / "one")
    now = Origins().classifier(SourceConfig(**saved["source"]), 3)
    assert now == {name: saved[name] for name in ("texts", "model")}
    other = Origins().classifier(SourceConfig(**saved["source"]), 4)
    assert other != now


def test_predictions_of_other_documents_are_not_compared(folder):
    found = {name: [measured.classifier(folder / f"out/{name}-seed0", 1)] for name in ("svd", "sgns")}
    other = found["sgns"][0]
    found["sgns"] = [other._replace(labels=1 - other.labels)]
    paths = {name: [folder / f"out/{name}-seed0"] for name in found}
    with pytest.raises(compare.InputError, match=r"sgns-seed0/predictions.npz: is of other test documents"):
        results._difference(results.Page("x", results.Path("x")), paths, found)


def test_one_comparison_writes_into_a_folder_at_a_time(folder, monkeypatch, refused):
    with filelock.FileLock(folder / "out" / ".lock"):
        before = (folder / "out" / "config.json").read_bytes()
        refused(compare.main, flags(folder, LM + " --seed 3"), "out: another comparison writes there; wait")
        assert (folder / "out" / "config.json").read_bytes() == before
    assert call(compare.main, monkeypatch, *flags(folder)) == 0
