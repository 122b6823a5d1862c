"""The comparison on a tiny data set, from pre-training to the page."""

import json
import shutil

import filelock
import jax
import pytest
from matplotlib.figure import Figure
from tiny import call, write_corpus

from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_config
from experiments.compare import __main__ as compare, results
from experiments.compare.stages import METHODS, Comparison, DataConfig, run_stages

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.filterwarnings("ignore:all test texts are classified as"),  # the runs are tiny
]
EXTRA_FLAGS = {
    "pretrain": "--embedding 4 --cells 4 --epochs 1",
    "vectors": "--dimensions 4 --epochs 1",
    "downstream": "--hidden 4 --epochs 1 --classifier-layers 1 --batch-size 16",
}
FLAGS = ["--dataset", "data", "--min-count", "1", "--output", "out"]
FLAGS += [f"--{command}={flags}" for command, flags in EXTRA_FLAGS.items()]


@pytest.fixture(scope="module")
def trained_comparison(tmp_path_factory):
    """A folder with a data set, "data", and a finished comparison, "out"."""
    folder = tmp_path_factory.mktemp("comparison")
    write_corpus(folder / "data", last="s,the goal of 0")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.chdir(folder)
        patch.setattr(jax, "clear_caches", lambda: None)  # the classifiers share compiled functions
        patch.setattr(Figure, "savefig", lambda figure, file: file.write(b"\x89PNG"))
        assert call(compare.main, patch, *FLAGS) == 0
    return folder


@pytest.fixture
def folder(trained_comparison, tmp_path, monkeypatch):
    """A copy of the finished comparison, the working directory."""
    shutil.copytree(trained_comparison, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: file.write(b"\x89PNG"))
    return tmp_path / "copy"


def configure(data="data", output="out", pretrained=None):
    data = DataConfig() if pretrained else DataConfig(data, min_count=1)
    return compare.CompareConfig(data, output=output, pretrained=pretrained, **EXTRA_FLAGS)


def list_stages(data="data", output="out", pretrained=None):
    """The stages of the comparison, as it would run now."""
    return Comparison(configure(data, output, pretrained)).stages


def reasons(stages):
    return {stage.name: stage.stale_reason for stage in stages if not stage.is_finished}


def test_page_has_the_metrics_of_every_method(trained_comparison):
    out = trained_comparison / "out"
    markdown, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    for method, (_, name) in METHODS.items():
        test = json.loads((out / f"{name}-seed0" / "results.json").read_text())["test"]
        assert f"| {method} | test | {test['accuracy']:.4f} | {test['f1']:.4f} |" in markdown
    assert "AG News" not in markdown  # the report's accuracies are for another data set
    assert html.count("data:image/png;base64,") == 1 + 2 + 3 + 18 and 'src="http' not in html


def test_second_call_runs_unfinished_stages_only(folder, monkeypatch, capsys):
    (folder / "out" / "svd-seed0" / "results.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("out/*/results.json")}
    assert call(compare.main, monkeypatch, *FLAGS) == 0
    lines = [line.split("] ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()[:8]]
    assert "svd seed 0: running" in lines
    assert sum(line.endswith(": already finished") for line in lines) == 7
    assert (folder / "out" / "svd-seed0" / "results.json").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_comparison_can_be_moved_with_its_data(folder):
    assert reasons(list_stages()) == {}
    (folder / "out").rename(folder / "moved")
    (folder / "data").rename(folder / "texts")
    assert reasons(list_stages(str(folder / "texts"), str(folder / "moved"))) == {}


@pytest.mark.parametrize(("old", "new"), [("team", "teem"), ("s,", "sport,")])
def test_changed_words_or_classes_make_every_run_stale(folder, old, new):
    for name in ("train.csv", "test.csv"):
        path = folder / "data" / name
        path.write_text(path.read_text().replace(old, new))
    stages = list_stages()
    assert not any(stage.is_finished for stage in stages)
    assert {stage.stale_reason for stage in stages[:3]} == {"its texts have changed"}
    with pytest.raises(InputError, match=r"its data set has changed since it was trained; train it again"):
        Comparison(configure(pretrained="out/pretrain"))


def test_changed_features_make_their_classifier_stale(folder):
    shutil.copy(folder / "out" / "sgns" / "vectors.npz", folder / "out" / "svd" / "vectors.npz")
    assert reasons(list_stages()) == {"svd seed 0": "the model it builds on has changed"}


def test_given_language_model_is_used(folder):
    (folder / "out" / "pretrain").rename(folder / "lm")
    assert Comparison(configure(pretrained="lm")).data.dataset == "data"
    stages = list_stages(pretrained=str(folder / "lm"))
    assert reasons(stages) == {} and len(stages) == 8


def test_digests_are_those_that_a_classifier_records(folder):
    comparison = Comparison(configure())
    stage = comparison.classifier("ELMo, trainable λ", 3, labels=0.5, untrained=True)
    stage.command(stage.settings)
    assert stage.is_finished
    saved = read_config(stage.path)
    other = comparison.classifier("ELMo, trainable λ", 4, labels=0.5, untrained=True).inputs()
    assert other["texts"] != saved["texts"] and other["model"] != saved["model"]


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "predictions.npz"])
def test_damaged_file_is_one_message(folder, name):
    path = folder / "out" / "svd-seed0" / name
    path.write_text("x\n")
    message = rf"{name}: cannot be read \(.*\); remove .*svd-seed0/results.json and run this command again"
    with pytest.raises(InputError, match=message):
        results.read_classifiers({"SVD": [stage for stage in list_stages() if stage.name == "svd seed 0"]})


def test_matching_runs_of_another_folder_are_copied(folder, capsys):
    stages = list_stages(output="other")
    names = {stage.name for stage in stages}
    run_stages(stages, folder / "other", folder / "out")
    said = capsys.readouterr().out
    assert all(f"{name}: copied from {folder / 'out'}" in said for name in names)
    assert not [stage.name for stage in list_stages(output="other") if not stage.is_finished]


def test_one_comparison_at_a_time_writes_into_a_folder(folder, refused):
    before = (folder / "out" / "config.json").read_bytes()
    with filelock.FileLock(folder / "out" / ".lock"):
        refused(compare.main, [*FLAGS, "--seeds", "2"], "out: another comparison writes there; wait for it")
    assert (folder / "out" / "config.json").read_bytes() == before
