"""A trained text classifier: saved, loaded, and applied to new texts."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny import SMALL, TINY, call

from elmo_jax.baselines.bag_of_words import BagOfWords
from elmo_jax.data.batching import Documents
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.predictors import TextClassifier, TextClassifierConfig
from experiments import downstream, pretrain, vectors

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """Return a finished run of downstream with a fine-tuned language model."""
    out = tmp_path_factory.mktemp("classifier") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--pretrained", trained[0], *SMALL, "--finetune", "--output", out]
        assert call(downstream.main, patch, *flags) == 0
    return out


@pytest.fixture(scope="module")
def texts(trained):
    lines = (trained[0].parent / "data" / "test.csv").read_text().splitlines()
    return [line.partition(",")[2].strip('"') for line in lines]


def test_run_and_saved_folder_give_the_predictions_of_the_run(run, texts, tmp_path):
    model = TextClassifier.from_pretrained(run)
    with np.load(run / "predictions.npz") as saved:
        expected = np.array(model.classes, object)[saved["test"]]
    assert model.predict(texts).tolist() == expected.tolist()
    model.save_pretrained(tmp_path / "model")
    again = TextClassifier.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_proba(texts), model.predict_proba(texts))
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict_proba(texts), model.predict_proba(texts))
    results = json.loads((run / "results.json").read_text())
    labels = [line.partition(",")[0] for line in _test_lines(run)]
    assert model.evaluate(texts, labels) == results["test"]


def _test_lines(run):
    config = json.loads((run / "config.json").read_text())
    folder = json.loads(((run / config["source"]["pretrained"]) / "config.json").read_text())["data"][
        "dataset"
    ]
    with open(f"{folder}/test.csv", encoding="utf-8") as file:
        return file.read().splitlines()


@pytest.mark.slow
def test_predictions_are_bitwise_equal_in_another_process_with_more_devices(run, texts, tmp_path):
    model = TextClassifier.from_pretrained(run)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys, jax, numpy as np, elmo_jax; assert jax.device_count() == 4; "
        "model = elmo_jax.TextClassifier.from_pretrained(sys.argv[1]); "
        "np.save(sys.argv[3], model.predict_proba(json.load(open(sys.argv[2]))))"
    )
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    args = [run, tmp_path / "texts.json", tmp_path / "p.npy"]
    subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], check=True, env=os.environ | {"XLA_FLAGS": flags}
    )
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), model.predict_proba(texts))


def test_words_with_spaces_survive_saving(tmp_path):
    words = ["new york", "r ", "\u2028z"]
    vocabulary = Vocabulary.from_counts(dict.fromkeys(words, 1))
    documents = Documents.of([[word] for word in words], vocabulary, labels=[0, 1, 1])
    config = TextClassifierConfig(("a", "b"), "tfidf", weights=(0.0, 1.0, 0.0))
    model = TextClassifier(config, {}, vocabulary, BagOfWords.fit(documents, vocabulary, 2))
    model.save_pretrained(tmp_path / "model")
    tokens = [[word] for word in words]
    again = TextClassifier.from_pretrained(tmp_path / "model").predict_proba(tokens)
    np.testing.assert_array_equal(again, model.predict_proba(tokens))
    broken = Vocabulary.from_counts({"a\nb": 1})
    with pytest.raises(InputError, match="holds a line break"):
        TextClassifier(config, {}, broken, None).save_pretrained(tmp_path / "other")


def test_prediction_of_a_text_does_not_depend_on_the_others(run, texts):
    model = TextClassifier.from_pretrained(run)
    together = model.predict_proba(texts)
    alone = np.concatenate([model.predict_proba([text]) for text in texts[:5]])
    np.testing.assert_allclose(alone, together[:5], atol=1e-6)
    tokens = [text.lower().split() for text in texts[:5]]
    np.testing.assert_allclose(model.predict_proba(tokens), together[:5], atol=1e-6)
    np.testing.assert_allclose(model.predict_proba(["", "unknownword"]).sum(-1), 1)


def test_finetuned_language_model_loads_as_elmo(run, trained, tmp_path):
    tuned, before = Elmo.from_pretrained(run), Elmo.from_pretrained(trained[0])
    sentence = [before.vocabulary.tokens[4:8]]
    assert not np.allclose(tuned.embed(sentence)[0], before.embed(sentence)[0])
    of_model = TextClassifier.from_pretrained(run).elmo
    np.testing.assert_array_equal(of_model.embed(sentence)[0], tuned.embed(sentence)[0])
    tuned.save_pretrained(tmp_path / "tuned")
    np.testing.assert_array_equal(
        Elmo.from_pretrained(tmp_path / "tuned").embed(sentence)[0], tuned.embed(sentence)[0]
    )


@pytest.mark.slow
def test_character_model_predicts_for_words_that_it_has_not_seen(corpus, tmp_path, monkeypatch):
    lm, out = tmp_path / "lm", tmp_path / "run"
    characters = ["--input", "characters", "--filters", "1", "4", "2", "4", "--character-features", "2"]
    assert call(pretrain.main, monkeypatch, "--dataset", corpus, "--output", lm, *TINY, *characters) == 0
    assert call(downstream.main, monkeypatch, "--pretrained", lm, *SMALL, "--output", out) == 0
    model = TextClassifier.from_pretrained(out)
    np.testing.assert_allclose(model.predict_proba(["neverseen wörd", "other"]).sum(-1), 1)
    network = [model.network_log_probabilities(model._documents([[w]])) for w in ("abc", "xyz")]
    assert not np.array_equal(*network)


@pytest.mark.parametrize("features", ["tfidf", "sgns"])
def test_classifiers_without_a_language_model_save_and_load(features, trained, tmp_path, monkeypatch):
    data, out = trained[0].parent / "data", tmp_path / "run"
    flags = ["--features", features, "--dataset", data, "--output", out]
    if features == "sgns":
        made = ["--min-count", "1", "--dimensions", "4", "--epochs", "1", "--output", tmp_path / "v"]
        assert call(vectors.main, monkeypatch, "--dataset", data, *made) == 0
        flags += ["--vectors", tmp_path / "v", *SMALL]
    assert call(downstream.main, monkeypatch, *flags) == 0
    model = TextClassifier.from_pretrained(out)
    assert set(model.predict(["some text", "more"])) <= set(model.classes)
    with pytest.raises(InputError, match="no language model"):
        _ = model.elmo


def test_folders_and_labels_that_do_not_fit_are_refused_in_one_line(run, pretrained, texts, tmp_path):
    with pytest.raises(InputError, match="holds no text classifier"):
        TextClassifier.from_pretrained(pretrained)
    model = TextClassifier.from_pretrained(run)
    with pytest.raises(InputError, match="label 'nonsense' is not one of the classes"):
        model.evaluate(texts[:1], ["nonsense"])
    with pytest.raises(InputError, match="pass a list of strings"):
        model.predict("a single text")
    for odd in ([[1, 2]], [{"goal": 1}], [[["goal"]]], [b"goal"]):
        with pytest.raises(InputError, match="pass a string or a list of tokens"):
            model.predict(odd)
    for arguments, message in (
        (([], []), "no texts"),
        ((texts, "s"), "labels are 's'"),
        ((texts, None), "are None"),
    ):
        with pytest.raises(InputError, match=message):
            model.evaluate(*arguments)
    for weights in ([1], [0, float("nan"), 0], [-1, 0, 0]):
        with pytest.raises(InputError, match="three finite numbers"):
            model.with_weights(weights)
    shutil.copytree(run, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(InputError, match="holds no text classifier"):
        TextClassifier.from_pretrained(tmp_path / "unfinished")
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="is not what was saved"):
        TextClassifier.from_pretrained(tmp_path / "model")
