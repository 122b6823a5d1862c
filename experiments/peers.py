"""PyTorch's side of the benchmark; it is optional, and needs no JAX.

A *stack* is one direction's LSTM layers. `nn.LSTM(bidirectional=True)` is another model: it
feeds both directions into the second layer, which so reads what it is to predict.
Axes: B batch, T time, D direction, H cells, P projection, V vocabulary.
"""

# pyright: reportMissingImports=false

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import torch_elmo
from experiments.cases import DIRECTIONS, Case
from experiments.torch_elmo import DEVICE, tensor
from experiments.worker import B1, RATE, Arrays, Built, is_weight


def build(case: Case, arrays: Arrays) -> Built:
    """PyTorch's side of a case."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    make = {
        "product": _product,
        "copy": _copy,
        "lstm": _lstm,
        "softmax": _softmax,
        "optimiser": _optimiser,
        "step": _step,
        "recipe": _recipe,
        "official": torch_elmo.build_training,
        "embed": torch_elmo.build_embedding,
    }[case.part]
    return make(case, arrays)


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def precision(case: Case) -> Any:
    """The context in which products run in the case's precision.

    On CUDA PyTorch runs its LSTM in float16 under any autocast, which is as fast as bfloat16.
    """
    if case.precision == "bfloat16":
        return torch.autocast(DEVICE, torch.bfloat16)
    return contextlib.nullcontext()


def repeat(step: Any) -> Any:
    """What runs a function n times and waits."""

    def run(n: int) -> Any:
        out = [step() for _ in range(n)]
        wait()
        return out

    return run


def _product(case: Case, arrays: Arrays) -> Built:
    x = tensor(arrays["x"]).to(torch.bfloat16 if case.precision == "bfloat16" else torch.float32)
    out = torch.empty_like(x)
    step = lambda: torch.matmul(x, x, out=out)  # noqa: E731
    return Built(lambda: {"product": step().float().cpu().numpy()}, [(repeat(step), 1.0)])


def _copy(case: Case, arrays: Arrays) -> Built:
    del case
    x = tensor(arrays["x"])
    out = torch.empty_like(x)
    step = lambda: torch.neg(x, out=out)  # noqa: E731
    return Built(lambda: {"copy": step()[:8].cpu().numpy()}, [(repeat(step), 1.0)])


def gates(w: np.ndarray) -> np.ndarray:
    """Our gates i, j, f, o in PyTorch's order i, f, g, o, the first axis being theirs."""
    i, j, f, o = np.split(w, 4, axis=-1)
    return np.ascontiguousarray(np.concatenate([i, f, j, o], axis=-1).T)


def load_stack(case: Case, arrays: Arrays, d: int) -> nn.LSTM:
    """One direction. PyTorch has two biases where one does; the second stays 0."""
    lstm = nn.LSTM(case.width, case.cells, case.layers)
    with torch.no_grad():
        for i in range(case.layers):
            bias = gates(arrays[f"lstm_{i}/bias"][d]).copy()
            bias[case.cells : 2 * case.cells] += 1  # this library adds it when the cell runs
            for name, value in (
                (f"weight_ih_l{i}", gates(arrays[f"lstm_{i}/input_kernel"][d])),
                (f"weight_hh_l{i}", gates(arrays[f"lstm_{i}/recurrent_kernel"][d])),
                (f"bias_ih_l{i}", bias),
                (f"bias_hh_l{i}", np.zeros_like(bias)),
            ):
                lstm.get_parameter(name).copy_(torch.from_numpy(value))
            lstm.get_parameter(f"bias_hh_l{i}").requires_grad_(False)
    lstm.to(DEVICE).flatten_parameters()
    return lstm


def _ungated(g: Tensor) -> np.ndarray:
    i, f, j, o = np.split(g.float().cpu().numpy(), 4)
    return np.concatenate([i, j, f, o]).T


def by_layer(case: Case, stacks: Sequence[Any], of: Callable[[Tensor], Any]) -> dict[str, np.ndarray]:
    """The gradients of all layers by this library's names, `of` telling that of a parameter."""
    names = (("input_kernel", "weight_ih"), ("recurrent_kernel", "weight_hh"), ("bias", "bias_ih"))
    return {
        f"d:lstm_{i}/{ours}": np.stack([_ungated(of(s.get_parameter(f"{theirs}_l{i}"))) for s in stacks])
        for i in range(case.layers)
        for ours, theirs in names
    }


def _lstm(case: Case, arrays: Arrays) -> Built:
    stacks = [load_stack(case, arrays, d) for d in range(DIRECTIONS)]
    xs = [tensor(np.ascontiguousarray(arrays["x"][:, d])).requires_grad_() for d in range(DIRECTIONS)]
    cotangents = [tensor(np.ascontiguousarray(arrays["cotangent"][:, d])) for d in range(DIRECTIONS)]

    def step() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for stack, x, cotangent in zip(stacks, xs, cotangents, strict=True):
            stack.zero_grad()
            x.grad = None
            with precision(case):
                h, _ = stack(x)
            loss = (h.float() * cotangent).sum()
            loss.backward()
            total += loss.detach()
        return total

    def check() -> dict[str, np.ndarray]:
        out = {"loss": step().cpu().numpy()}
        out["d:x"] = np.stack([x.grad.cpu().numpy() for x in xs], axis=1)  # type: ignore[union-attr]
        return out | by_layer(case, stacks, lambda p: p.grad)

    return Built(check, [(repeat(step), 1.0)])


def _softmax(case: Case, arrays: Arrays) -> Built:
    leaves = {n: tensor(arrays[n]).requires_grad_() for n in ("hidden", "table", "bias")}
    hidden, table, bias = leaves.values()
    targets = tensor(arrays["targets"])
    sampled = [tensor(arrays[n]) for n in ("drawn", "log_expected")] if case.negatives else None

    def step() -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        if sampled:
            rows = lambda ids: (table[ids], bias[ids])  # noqa: E731
            loss = torch_elmo.sampled_sum(hidden, rows, targets, *sampled)
        else:
            loss = F.cross_entropy(F.linear(hidden, table, bias), targets, reduction="sum")
        loss.backward()
        return loss.detach()

    def check() -> dict[str, np.ndarray]:
        loss = step().cpu().numpy()
        return {"loss": loss} | {f"d:{n}": leaf.grad.cpu().numpy() for n, leaf in leaves.items()}  # type: ignore[union-attr]

    return Built(check, [(repeat(step), 1.0)])


def _optimiser(case: Case, arrays: Arrays) -> Built:
    del case
    weights = {name: tensor(a).requires_grad_() for name, a in arrays.items() if is_weight(name)}
    for name, w in weights.items():
        w.grad = tensor(arrays[f"d:{name}"])
    step = torch.optim.Adam(list(weights.values()), RATE, fused=True).step

    def check() -> dict[str, np.ndarray]:
        step()
        return {"bias": weights["softmax_bias"].detach().cpu().numpy().copy()}

    return Built(check, [(repeat(step), 1.0)])


class Model(nn.Module):
    """Token vectors, a stack a direction, and a full softmax, perhaps of the token vectors' table."""

    def __init__(self, case: Case, arrays: Arrays):
        super().__init__()
        self.case, self.dropout = case, 0.0
        self.table = nn.Parameter(tensor(arrays["embedder/table"]))
        tied = "softmax_table" not in arrays
        self.softmax = self.table if tied else nn.Parameter(tensor(arrays["softmax_table"]))
        self.bias = nn.Parameter(tensor(arrays["softmax_bias"]))
        self.stacks = nn.ModuleList(load_stack(case, arrays, d) for d in range(DIRECTIONS))

    def forward(self, d: int, ids: Tensor, real: Tensor) -> Tensor:
        """A direction's share of the mean loss: ids ``[T + 1, B]`` as it reads them, the numbers of the
        real ones among the T B to predict; known beforehand, or a GPU would wait to be told."""
        with precision(self.case):
            h = self._drop(self.stacks[d](self._drop(F.embedding(ids[:-1], self.table)))[0])
            logits = F.linear(h.flatten(0, 1).index_select(0, real), self.softmax, self.bias)
        targets = ids[1:].flatten().index_select(0, real)
        return F.cross_entropy(logits.float(), targets, reduction="mean") / DIRECTIONS

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout else x


def reading(words: np.ndarray, lengths: np.ndarray) -> tuple[list[Tensor], list[Tensor]]:
    """Of each direction ids ``[T + 1, B]``, from ``[B, T + 1]``, and which of those to predict are real."""
    turned = words.copy()
    for row, n in zip(turned, lengths, strict=True):
        row[:n] = row[:n][::-1]
    mask = np.arange(words.shape[1] - 1)[:, None] < lengths[None] - 1
    real = torch.from_numpy(np.flatnonzero(mask)).to(DEVICE)
    return [tensor(np.ascontiguousarray(w.T)) for w in (words, turned)], [real] * DIRECTIONS


def _stepper(model: Model, words: list[Tensor], real: list[Tensor], optimizer: Any):
    """A step; each direction goes backward before the other's logits are made, for memory's sake."""

    def step() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros((), device=DEVICE)
        for d in range(DIRECTIONS):
            loss = model(d, words[d], real[d])
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    return step


def _step(case: Case, arrays: Arrays) -> Built:
    model = Model(case, arrays)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE, fused=True)
    run = repeat(_stepper(model, *reading(arrays["words"], arrays["lengths"]), optimizer))

    def first_gradient(p: Tensor) -> Tensor:
        return optimizer.state[p]["exp_avg"] / (1 - B1)  # after one step

    def check() -> dict[str, np.ndarray]:
        first = run(1)
        out = by_layer(case, list(model.stacks), first_gradient)
        out["d:softmax_bias"] = first_gradient(model.bias).cpu().numpy()
        return out | {"loss": np.array([float(loss) for loss in (*first, *run(2))])}

    return Built(check, [(run, 1.0)])


def _recipe(case: Case, arrays: Arrays) -> Built:
    """The same model and batches with the full softmax; the loss is checked without dropout."""
    model = Model(case, arrays)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE, fused=True)
    runs: list[Any] = []
    read: list[Any] = []
    for bound, steps in zip(arrays["bounds"].tolist(), arrays["steps"].tolist(), strict=True):
        words, real = reading(arrays[f"words:{bound}"][0], arrays[f"lengths:{bound}"][0])
        read.append((words, real))
        runs.append((repeat(_stepper(model, words, real, optimizer)), float(steps)))

    def check() -> dict[str, np.ndarray]:
        with torch.no_grad():
            words, real = read[0]
            loss = np.array(sum(float(model(d, words[d], real[d])) for d in range(DIRECTIONS)))
        model.dropout = 0.1
        for stack in model.stacks:
            stack.dropout = 0.1  # type: ignore[assignment]
        return {"loss": loss}

    return Built(check, runs)
