"""Cases of the benchmark at shapes that compile and run in a moment."""

from dataclasses import replace

from experiments.benchmark.cases import (
    CASES,
)
from experiments.benchmark.inputs import make_inputs

_BY_NAME = {case.name: case for case in CASES}


_SHAPES = {"batch": 3, "steps": 5, "vocabulary": 40, "sentences": 3, "cells": 6}


_CNN = {"filters": ((1, 3), (2, 5)), "characters": 4}


def tiny(name):
    """A case of the benchmark at shapes that compile and run in a moment."""
    case = _BY_NAME[name]
    width = 6 if case.cells == case.width else 4
    few = {"negatives": 7} if case.negatives else {}
    return replace(case, **_SHAPES, width=width, **few, **(_CNN if case.filters else {}))


def side(module, case):
    arrays, _ = make_inputs(case, seed=1)
    return module.build(case, arrays)
