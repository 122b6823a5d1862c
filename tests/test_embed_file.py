import gzip
import json
from dataclasses import asdict, replace

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lines import LINES

from elmo_jax import embed_file as module
from elmo_jax.data.text import read_lines
from elmo_jax.elmo import Elmo
from elmo_jax.embed_file import Dump, DumpConfig
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
from elmo_jax.models.combiners import CombinerConfig, Mix, make_combiner
from elmo_jax.storage.files import tree_digest
from elmo_jax.training.checkpoint import Position, Run
from elmo_jax.training.objectives import init_params
from experiments import embed, evaluate
from experiments.common.config import SourceConfig


def write(elmo, text, mix=None, **settings):
    dump = Dump(elmo, text, text.with_name("out.h5"), DumpConfig(**settings), mix)
    dump.prepare(resume=True, overwrite=False)
    dump.write()
    with h5py.File(dump.target) as file:
        return {name: data[...] for name, data in file.items()}, dump


@pytest.mark.parametrize("long", [module._LONG, 2])
@pytest.mark.parametrize("layers", ["all", "top", "average", "mix", "normed mix"])
def test_a_dump_holds_what_embed_gives(elmo, text, layers, long, monkeypatch):
    monkeypatch.setattr(module, "_LONG", long)
    monkeypatch.setattr("elmo_jax.data.text.BLOCK_TOKENS", 6)
    lambdas = [0.5, -1.0, 2.0]
    mix = Mix(lambdas, layers == "normed mix") if "mix" in layers else None
    held, dump = write(elmo, text, mix, layers=layers.removeprefix("normed "))
    assert json.loads(held.pop("sentence_to_index")[0]) == {line: str(i) for i, line in enumerate(LINES)}
    assert held.keys() == set(map(str, range(5)))
    weights = {"top": [0, 0, 1], "average": [1 / 3] * 3}.get(layers, lambdas)
    for i, whole in enumerate(elmo.embed([line.split() for line in LINES])):
        if layers == "normed mix":
            combiner = make_combiner(CombinerConfig(layer_norm=True))
            want = combiner.apply({"params": {"weights": jnp.array(lambdas)}}, whole[:, None])[0]
        else:
            want = whole if layers == "all" else np.einsum("l,ltf->tf", weights, whole)
        assert held[str(i)].dtype == np.float32
        np.testing.assert_allclose(held[str(i)], want, atol=5e-6)
    assert not dump.parts.exists()
    assert dump.size == sum(a.nbytes for a in held.values())


def test_an_index_larger_than_its_pieces_is_whole(elmo, text, monkeypatch):
    monkeypatch.setattr(module, "_INDEX_BYTES", 20)
    held, _ = write(elmo, text)
    pieces = [json.loads(piece) for piece in held["sentence_to_index"]]
    assert len(pieces) == 2 and list(pieces[1].values()) == ["3", "4"]
    assert pieces[0] | pieces[1] == {line: str(i) for i, line in enumerate(LINES)}


@pytest.mark.parametrize("harm", ["cut off", "another byte", "a dataset less"])
def test_a_damaged_part_is_made_again(elmo, text, monkeypatch, harm):
    monkeypatch.setattr("elmo_jax.data.text.BLOCK_TOKENS", 6)
    whole, _ = write(elmo, text)
    dump = Dump(elmo, text, text.with_name("again.h5"), DumpConfig())
    dump.prepare(resume=False, overwrite=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dump, "_join_parts", lambda self: None)
        dump.write()
    part = sorted(dump.parts.glob("*.h5"))[0]
    data = bytearray(part.read_bytes())
    if harm == "cut off":
        part.write_bytes(data[: len(data) // 2])
    elif harm == "another byte":
        at = data.find(whole["0"][0, :, :4].tobytes())
        data[at] ^= 1
        assert at > 0
        part.write_bytes(data)
    else:
        with h5py.File(part, "r+") as file:
            del file["0"]
    dump.prepare(resume=True, overwrite=False)
    with pytest.warns(UserWarning, match=r"000000\.h5: is damaged and is written again") as warned:
        dump.write()
    assert len(warned) == 1
    with h5py.File(dump.target) as file:
        for name, data in whole.items():
            np.testing.assert_array_equal(file[name][...], data)


def test_half_precision_and_checksums(elmo, text):
    held, dump = write(elmo, text, dtype="float16")
    assert held["0"].dtype == np.float16
    with h5py.File(dump.target) as file:
        assert file["0"].fletcher32


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (b"the bank\nthe \xff bank\n", {}, r"in\.txt:2: byte 0xff is not UTF-8"),
        (b"the\nthe bank rose\n", {"long": "refuse", "max_length": 2}, r"in\.txt:2: has 3 tokens"),
        (None, {}, r"in\.txt: cannot be read"),
    ],
)
def test_a_wrong_text_is_named(elmo, text, data, settings, said):
    text.unlink() if data is None else text.write_bytes(data)
    with pytest.raises(InputError, match=said):
        write(elmo, text, **settings)


def test_a_text_may_be_packed(elmo, text, monkeypatch):
    packed = text.with_name("in.txt.gz")
    packed.write_bytes(gzip.compress(text.read_bytes()))
    monkeypatch.setattr(module, "_INDEX_BYTES", 1)  # smaller than the text, and so than what is packed
    want, _ = write(elmo, text)
    dump = Dump(elmo, packed, text.with_name("packed.h5"), DumpConfig())
    dump.prepare(resume=False, overwrite=False)
    dump.write()
    with h5py.File(dump.target) as got:
        for name in want:
            np.testing.assert_array_equal(got[name][...], want[name])
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"in\.txt\.gz: cannot be read \(.*\); check the file"):
        list(read_lines(packed, str.split))


def test_a_carriage_return_ends_no_line(elmo, text):
    text.write_bytes(b"the bank\rbank\r\nbank the\n")
    held, _ = write(elmo, text)
    index = json.loads(held.pop("sentence_to_index")[0])
    assert index == {"the bank\rbank": "0", "bank the": "1"} and held.keys() == {"0", "1"}


def test_commands(elmo, text, tmp_path, capsys, monkeypatch):
    elmo.save_pretrained(tmp_path / "model")
    run = lambda module, *args: (monkeypatch.setattr("sys.argv", ["x", *map(str, args)]), module.main())[1]  # noqa: E731
    out = tmp_path / "out.h5"
    assert run(embed, text, out, "--pretrained", tmp_path / "model", "--layers", "top") == 0
    assert out.exists() and "5 lines, 27 tokens" in capsys.readouterr().out
    assert run(embed, text, out, "--pretrained", tmp_path / "model") == 2
    assert "out.h5: already exists" in capsys.readouterr().err
    assert run(embed, text, out) == 2
    assert "give one of --pretrained RUN and --bilm" in capsys.readouterr().err
    assert run(embed, text, out, "--pretrained", tmp_path / "model", "--layers", "mix") == 2
    assert "--mix-from" in capsys.readouterr().err

    scores = tmp_path / "scores"
    assert run(evaluate, tmp_path / "model", text, "--output", scores) == 0
    said = capsys.readouterr().out
    each = elmo.surprisal([line.split() for line in LINES if line])
    total = sum(a.sum(1) for a in each) / sum(a.shape[1] for a in each)
    assert f"perplexity {np.exp(total.mean()):.2f} (forward {np.exp(total[0]):.2f}" in said
    unknown = sum(word not in elmo.vocabulary.tokens for line in LINES for word in line.split())
    assert unknown > 0 and f"{unknown} of them (" in said
    lines = [json.loads(line) for line in (scores / "scores.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 3, 4, 5]
    np.testing.assert_allclose(lines[0]["log_p_forward"], -each[0][0].sum(), rtol=1e-5)
    assert not (scores / "scores.jsonl.part").exists()
    assert run(evaluate, tmp_path / "model", text, "--output", scores) == 2
    assert "holds a run or scores already" in capsys.readouterr().err
    assert run(evaluate, tmp_path / "model") == 2
    assert "at least one text" in capsys.readouterr().err


def downstream_run(path, elmo, lambdas, results=True, trained=None, **source):
    """A run as experiments.downstream leaves it, its language model changed if it was finetuned."""
    combiner = CombinerConfig(layer_norm=True)
    config = {"source": asdict(SourceConfig(**source)), "combiner": asdict(combiner)}
    config["model"] = tree_digest(elmo.params)
    run = Run.create(path, config, monitor="val_loss", overwrite=True)
    params = {"combiner": {"weights": np.array(trained or lambdas or [1, 1, 1], np.float32)}}
    if source.get("finetune"):
        params["bilm"] = jax.tree.map(lambda a: a + np.float32(0.1), elmo.params)
    run.save({"params": params}, Position(step=1))
    run.close()
    if results:
        (path / "results.json").write_text(json.dumps({"lambdas": lambdas}))
    return path


def test_a_mix_is_the_one_that_was_trained(elmo, tmp_path):
    path = downstream_run(tmp_path / "down", elmo, [0.5, -1, 2])
    same, mix = embed.load_mix(elmo, path)
    assert same is elmo and mix == Mix([0.5, -1.0, 2.0], layer_norm=True)
    tuned, mix = embed.load_mix(elmo, downstream_run(path, elmo, [1, 1, 1], finetune=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 0.1, atol=1e-6), tuned.params, elmo.params)
    assert tuned.vocabulary is elmo.vocabulary and mix.layer_norm


@pytest.mark.parametrize(
    ("lambdas", "source", "said"),
    [
        ([float("nan"), 1, 1], {"trained": [1, 1, 1]}, "has no lambdas"),
        ([1, 1], {}, "has 2 lambdas for a model of 3 layers"),
        ([1, 1, 9], {"trained": [1, 1, 1]}, "lambdas differ from the saved parameters"),
        (None, {}, "has no lambdas"),
        ([1, 1, 1], {"results": False}, "has no lambdas"),
        ([1, 1, 1], {"untrained": True}, "its language model is untrained"),
    ],
)
def test_a_mix_that_cannot_be_had_is_named(elmo, tmp_path, lambdas, source, said):
    with pytest.raises(InputError, match=said):
        embed.load_mix(elmo, downstream_run(tmp_path / "down", elmo, lambdas, **source))


def test_a_mix_of_another_model_is_named(elmo, tmp_path):
    path = downstream_run(tmp_path / "down", elmo, [1, 1, 1], finetune=True)
    wider = BiLM(replace(elmo.model.config, cells=6), len(elmo.vocabulary))
    other = Elmo(wider, init_params(wider, jax.random.key(0)), elmo.vocabulary)
    with pytest.raises(InputError, match="uses another language model"):
        embed.load_mix(other, path)
    elmo.save_pretrained(tmp_path / "export")
    with pytest.raises(InputError, match=r"is not a run of downstream"):
        embed.load_mix(elmo, tmp_path / "export")


def test_evaluate_keeps_the_least_likely_words_and_sentences(rng):
    totals, every, lines = evaluate._Scores(words_shown=7), [], []
    for i in range(300):
        each = rng.exponential(size=(2, int(rng.integers(2, 9)))).astype(np.float32)
        line = [f"w{i}-{t}" for t in range(each.shape[1] - 1)]
        totals.add("f", i + 1, line, each)
        every += zip(((each[0, :-1] + each[1, 1:]) / 2).tolist(), line, strict=True)
        lines.append((float(each.sum(dtype=np.float64)) / each.shape[1], i + 1))
    assert [item[:2] for item in sorted(totals.words, reverse=True)] == sorted(every, reverse=True)[:7]
    assert [(a, n) for a, _, n, *_ in sorted(totals.lines, reverse=True)] == sorted(lines, reverse=True)[:5]
    assert totals.sentences == 300 and totals.tokens == len(every)


def test_a_text_without_sentences_leaves_no_scores(elmo, text, tmp_path, refused):
    elmo.save_pretrained(tmp_path / "model")
    text.write_text("\n \n")
    refused(
        evaluate.main, [tmp_path / "model", text, "--output", tmp_path / "out"], "no sentences; give a text"
    )
    assert not (tmp_path / "out").exists()


def test_raw_text_is_cleaned_as_data_sets_are(elmo, text):
    text.write_text("The &lt;b&gt;bank&lt;/b&gt; #39;s river\\rose\n")
    held, _ = write(elmo, text, tokenize=True)
    want = elmo.embed([["the", "bank", "'", "s", "river", "rose"]])[0]
    np.testing.assert_allclose(held["0"], want, atol=1e-6)


def test_products_in_bfloat16_are_near_and_another_dump(elmo, text, tmp_path, capsys, monkeypatch):
    elmo.save_pretrained(tmp_path / "model")
    run = lambda *args: (monkeypatch.setattr("sys.argv", ["x", *map(str, args)]), embed.main())[1]  # noqa: E731
    got = []
    for name, more in (("a.h5", []), ("b.h5", ["--precision", "bfloat16"])):
        assert run(text, tmp_path / name, "--pretrained", tmp_path / "model", *more) == 0
        with h5py.File(tmp_path / name) as file:
            got.append(file["2"][...])
    assert 0 < np.abs(got[0] - got[1]).max() < 0.05
    half = Elmo.from_pretrained(tmp_path / "model", dtype="bfloat16")
    np.testing.assert_array_equal(half.embed([LINES[2].split()])[0], got[1])
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16, not 'float16'"):
        Elmo.from_pretrained(tmp_path / "model", dtype="float16")
    Dump(elmo, text, tmp_path / "c.h5", DumpConfig()).prepare(resume=False, overwrite=False)
    with pytest.raises(InputError, match="another text, model or settings"):
        Dump(half, text, tmp_path / "c.h5", DumpConfig()).prepare(resume=True, overwrite=False)
