"""Configs refuse wrong values when they are made, and name the field."""

import dataclasses
import pickle
import typing

import numpy as np
import pytest

from elmo_jax import config as module
from elmo_jax.config import (
    BiLMConfig,
    CharCNNConfig,
    ClassifierConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    SVDConfig,
)
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import lstm_layer
from elmo_jax.models.lstm import LSTM
from elmo_jax.predictors import TextClassifierConfig
from elmo_jax.storage.files import structure

CONFIGS = [value for value in vars(module).values() if isinstance(value, type) and Config in value.__bases__]


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (
            OptimizerConfig,
            {"optimizer": "sgd"},
            "optimizer must be one of adam, lazy_adam, adagrad, not",
        ),
        (OptimizerConfig, {"learning_rate": -1}, "learning_rate must be above 0, not -1"),
        (OptimizerConfig, {"schedule": "cos"}, "schedule must be one of cosine, linear, constant, not 'cos'"),
        (OptimizerConfig, {"warmup": None}, "warmup must be a number, not None"),
        (BiLMConfig, {"dropout": 1.5}, "dropout must be below 1, not 1.5"),
        (BiLMConfig, {"dropout": float("nan")}, "dropout must be a finite number, not nan"),
        (BiLMConfig, {"cell_clip": float("inf")}, "cell_clip must be a finite number, not inf"),
        (BiLMConfig, {"layers": 0}, "layers must be at least 1, not 0"),
        (BiLMConfig, {"layers": 65}, "layers must be at most 64, not 65"),
        (BiLMConfig, {"layers": True}, "layers must be an integer, not True"),
        (BiLMConfig, {"layers": "2"}, "layers must be an integer, not '2'"),
        (BiLMConfig, {"cells": 2**31 - 1}, "cells must be at most 65536, not 2147483647"),
        (BiLMConfig, {"characters": 3}, "characters must be"),
        (CharCNNConfig, {"filters": ((1, 2), (51, 3))}, r"filters\[1\]\[0\] must be at most 50, not 51"),
        (CharCNNConfig, {"filters": ((0, 2),)}, r"filters\[0\]\[0\] must be at least 1, not 0"),
        (CharCNNConfig, {"filters": ((1, -2),)}, r"filters\[0\]\[1\] must be at least 1, not -2"),
        (CharCNNConfig, {"filters": ()}, r"filters must be of length at least 1, not \(\)"),
        (CharCNNConfig, {"highway": 2**31 - 1}, "highway must be at most 100"),
        (ClassifierConfig, {"pooling": "sum"}, "pooling must be one of mean, max, mean.max, attention"),
        (DataConfig, {"validation": 0.0}, "validation must be above 0, not 0.0"),
        (DataConfig, {"tokens": "custom"}, "tokens must be one of words, whitespace, not 'custom'"),
        (SVDConfig, {"exponent": float("inf")}, "exponent must be a finite number, not inf"),
        (TextClassifierConfig, {"classes": ("a", 3)}, r"classes\[1\] must be text, not 3"),
    ],
)
def test_wrong_value_is_refused_in_one_line(config, values, message):
    with pytest.raises(InputError, match=f"^{message}") as info:
        config(**values)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_bound_is_checked(config):
    made = config()
    for name, kind in typing.get_type_hints(config, include_extras=True).items():
        for meta in getattr(kind, "__metadata__", ()):
            for bound, values in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                limit = getattr(meta, bound)
                if limit is not None:
                    with pytest.raises(InputError, match=f"^{name} must be"):
                        dataclasses.replace(made, **{name: limit + values})


def test_numbers_of_numpy_are_floats_but_no_integers():
    assert OptimizerConfig(learning_rate=np.float64(0.1)).learning_rate == 0.1
    with pytest.raises(InputError, match=r"cells must be an integer, not np\.int64\(8\)"):
        BiLMConfig(cells=np.int64(8))


def test_configs_are_hashable_and_survive_pickling():
    config = BiLMConfig(cells=8)
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(BiLMConfig(cells=8))


def test_configs_read_from_json_are_checked():
    with pytest.raises(
        InputError, match=r"run: .*`int` <= 65536 - at `\$\.cells`; restore it or train again"
    ):
        structure(BiLMConfig, {"cells": 2**31 - 1}, "run")
    with pytest.raises(InputError, match=r"run: .*filters"):
        structure(BiLMConfig, {"characters": {"filters": [[0, 5]]}}, "run")


def test_unknown_kernels_are_refused():
    message = "kernel must be one of auto, plain, fast, persistent, not 'foo'"
    for layer in (LSTM(4, kernel="foo"), lstm_layer(BiLMConfig(cells=4), "foo")):
        with pytest.raises(InputError, match=message):
            layer.choose()
