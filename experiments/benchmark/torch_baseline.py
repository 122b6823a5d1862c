"""PyTorch's side of the benchmark; it is optional, and needs no JAX.

A *stack* is one direction's LSTM layers. `nn.LSTM(bidirectional=True)` is another model: it
feeds both directions into the second layer, which so reads what it is to predict.
Axes: B batch, T time, D direction, H cells, P projection, V vocabulary.

The official model in PyTorch, in the manner of AllenNLP: a Python loop over the steps of each layer.

Its cells are clipped and projected, which no fused LSTM of PyTorch does. Rows are sorted by
length, and a step runs only those that it reaches.
Axes: B batch, T time, N words, C characters, D direction, H cells, P projection.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmark.cases import DIRECTIONS, Case
from experiments.benchmark.runner import B1, RATE, Arrays, Built, is_weight, sentences_of

# pyright: reportMissingImports=false


_BATCH = 64  # sentences at once, where the user gives a list
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_C = 50
State = tuple[Tensor, Tensor]  # c [B, H], h [B, P]


def tensor(array: np.ndarray) -> Tensor:
    """On the device; ids as PyTorch wants them."""
    made = torch.from_numpy(array).to(DEVICE)
    return made.long() if made.dtype == torch.int32 else made


def spell(word: str) -> list[int]:
    """A word's 50 character ids."""
    if word in ("<S>", "</S>"):
        inner = [257 if word == "<S>" else 258]
    else:
        inner = [byte + 1 for byte in word.encode("utf-8", "ignore")[: _C - 2]]
    ids = [259, *inner, 260]
    return ids + [261] * (_C - len(ids))


class TorchELMo(nn.Module):
    """Char-CNN and LSTM layers, from this library's weights."""

    def __init__(self, case: Case, arrays: Arrays):
        super().__init__()
        self.case = case
        self.w = nn.ParameterDict()
        for name, a in arrays.items():
            by_direction = name.startswith("lstm")
            parts = {f"{name}:{d}": a[d] for d in range(DIRECTIONS)} if by_direction else {name: a}
            for part, values in parts.items() if is_weight(name) else ():
                self.w[part] = nn.Parameter(torch.from_numpy(_layout(name, values)).to(DEVICE))

    def get(self, name: str) -> Tensor:
        """A weight by this library's name."""
        return self.w[name]

    def words(self, ids: Tensor) -> Tensor:
        """Character ids ``[N, C]`` to token vectors ``[N, P]``."""
        table = self.get("embedder/characters")
        table = torch.cat([table.new_zeros(1, table.shape[1]), table])
        x = F.embedding(ids, table).transpose(1, 2)  # [N, d, C]
        each = []
        for i in range(len(self.case.filters)):
            y = F.conv1d(x, self.get(f"embedder/filter_{i}"), self.get(f"embedder/filter_bias_{i}"))
            each.append(torch.relu(y.max(dim=-1).values))
        y = torch.cat(each, dim=-1)
        gate = torch.sigmoid(self._dense("carry_0", y))
        y = gate * torch.relu(self._dense("transform_0", y)) + (1 - gate) * y
        return self._dense("projection", y)

    def _dense(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.get(f"embedder/{name}_kernel"), self.get(f"embedder/{name}_bias"))

    def layer(self, i: int, d: int, x: Tensor, lengths: list[int], state: State) -> tuple[Tensor, State]:
        """One direction of one layer over ``[B, T, P]``, rows by falling length; backward if d is 1."""
        w_x, w_h, w_p, b = (
            self.get(f"lstm_{i}/{kind}_kernel:{d}" if kind != "bias" else f"lstm_{i}/bias:{d}")
            for kind in ("input", "recurrent", "projection", "bias")
        )
        clip = self.case.clip or float("inf")
        c, h = state
        steps: list[Tensor | None] = [None] * x.shape[1]
        for t in range(x.shape[1]) if d == 0 else reversed(range(x.shape[1])):
            n = sum(length > t for length in lengths)
            z = F.linear(x[:n, t], w_x) + F.linear(h[:n], w_h, b)
            gate_i, j, f, o = z.chunk(4, dim=-1)
            new_c = torch.sigmoid(gate_i) * torch.tanh(j) + torch.sigmoid(f + 1) * c[:n]
            new_c = new_c.clamp(-clip, clip)
            new_h = F.linear(torch.sigmoid(o) * torch.tanh(new_c), w_p).clamp(-clip, clip)
            c, h = torch.cat([new_c, c[n:]]), torch.cat([new_h, h[n:]])
            steps[t] = F.pad(new_h, (0, 0, 0, len(x) - n))
        return torch.stack([s for s in steps if s is not None], dim=1), (c, h)

    def direction(
        self, d: int, x: Tensor, lengths: list[int], states: list[State]
    ) -> tuple[list[Tensor], list[State]]:
        """Every layer's states ``[B, T, P]`` in one direction, and what each layer ended with."""
        outputs, after = [], []
        for i in range(self.case.layers):
            h, last = self.layer(i, d, x, lengths, states[i])
            x = h + x if self.case.skip and i else h
            outputs.append(x)
            after.append(last)
        return outputs, after

    def zero_states(self, rows: int) -> list[State]:
        """The state of every layer of a direction before anything is read."""
        shapes = (rows, self.case.cells), (rows, self.case.width)
        zeros = tuple(torch.zeros(shape, device=DEVICE) for shape in shapes)
        return [(zeros[0], zeros[1])] * self.case.layers


def _layout(name: str, a: np.ndarray) -> np.ndarray:
    """A weight as PyTorch's products and convolutions read it."""
    kind = name.rsplit("/", 1)[-1]
    if kind.startswith("filter_") and "bias" not in kind:
        return np.ascontiguousarray(a.transpose(2, 1, 0))  # [filters, d, width]
    if kind.endswith("_kernel"):
        return np.ascontiguousarray(a.swapaxes(-1, -2))
    return a


def embed(model: TorchELMo, sentences: list[list[str]]) -> list[np.ndarray]:
    """Float32 ``[L, tokens, 2P]`` a sentence."""
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    lengths = [len(sentences[i]) + 2 for i in order]
    ids = np.zeros((len(order), lengths[0], _C), np.int64)
    for row, i in enumerate(order):
        ids[row, : lengths[row]] = [spell(word) for word in ("<S>", *sentences[i], "</S>")]
    with torch.inference_mode():
        x = model.words(torch.from_numpy(ids).to(DEVICE).reshape(-1, _C))
        x = x.reshape(len(order), lengths[0], -1)
        zero = model.zero_states(len(order))
        both = [[x, *model.direction(d, x, lengths, zero)[0]] for d in range(DIRECTIONS)]
        layers = torch.stack([torch.cat(pair, dim=-1) for pair in zip(*both, strict=True)]).cpu().numpy()
    out: list[Any] = [None] * len(order)
    for row, i in enumerate(order):
        out[i] = layers[:, row, 1 : lengths[row] - 1]
    return out


def build_embedding(case: Case, arrays: Arrays) -> Built:
    """A text's layer states, from strings to arrays."""
    model, text = TorchELMo(case, arrays), sentences_of(arrays)

    def run(n: int) -> list[np.ndarray]:
        out: list[np.ndarray] = []
        for _ in range(n):
            out = [a for i in range(0, len(text), _BATCH) for a in embed(model, text[i : i + _BATCH])]
        return out

    return Built(lambda: {"layers": np.concatenate(run(1), axis=1)}, [(run, 1.0)])


def sampled_sum(
    h: Tensor,
    rows: Callable[[Tensor], tuple[Tensor, Tensor]],
    targets: Tensor,
    drawn: Tensor,
    log_expected: Tensor,
) -> Tensor:
    """Sampled softmax over the target and shared negatives, summed; see `elmo_jax.sampled_nll`.

    Args:
        h: ``[N, P]``.
        rows: classes to their vectors and biases.
        targets: ``[N]``.
        drawn: ``[S]``.
        log_expected: ``[V]``.
    """
    vectors, biases = rows(targets)
    true = (h * vectors).sum(-1) + biases - log_expected[targets]
    vectors, biases = rows(drawn)
    noise = h @ vectors.T + (biases - log_expected[drawn])
    noise = noise.masked_fill(drawn[None] == targets[:, None], -1e30)
    return (torch.logsumexp(torch.cat([true[:, None], noise], 1), 1) - true).sum()


def build_training(case: Case, arrays: Arrays) -> Built:
    """Steps over a window with the state carried on; full softmax to check, sampled to time.

    Of the softmax a step moves the rows it names alone: their gradients are sparse, and so is Adagrad.
    """

    model = TorchELMo(case, arrays)
    chars, words, weight = (tensor(arrays[name]) for name in ("chars", "words", "weight"))
    carried = [model.zero_states(case.batch) for _ in range(DIRECTIONS)]
    bias = nn.Parameter(model.w.pop("softmax_bias").detach()[:, None])  # [V, 1], as rows are looked up
    table = model.w.pop("softmax_table")
    groups = [{"params": list(model.parameters())}, {"params": [table, bias]}]  # dense and sparse
    torch.sparse.check_sparse_tensor_invariants.disable()  # PyTorch warns where that is not said
    optimizer = torch.optim.Adagrad(groups, RATE, initial_accumulator_value=1.0, eps=1e-7)
    k = torch.arange(case.vocabulary, device=DEVICE, dtype=torch.float64)
    expected = torch.log((k + 2) / (k + 1)) / np.log(case.vocabulary + 1) * (case.negatives or 0)
    log_expected = expected.log().float()

    def hidden(d: int, rows: int, states: list[Any]) -> tuple[Tensor, Tensor, list[State]]:
        ids = chars[:, d, :rows]  # [U, B, C], as the direction reads
        x = model.words(ids.reshape(-1, _C)).reshape(*ids.shape[:2], -1).transpose(0, 1)
        # The window stands in reading order, so the backward layers are to turn it round again.
        x = x.flip(1) if d else x
        outputs, after = model.direction(d, x, [x.shape[1]] * rows, states)
        h = outputs[-1].flip(1) if d else outputs[-1]
        mask = weight[:, d, :rows].T.reshape(-1) > 0
        return h.reshape(-1, h.shape[-1])[mask], words[1:, d, :rows].T.reshape(-1)[mask], after

    def rows(ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, table, sparse=True), F.embedding(ids, bias, sparse=True)[:, 0]

    def step() -> Tensor:
        optimizer.zero_grad()
        drawn = torch.exp(torch.rand(case.negatives or 1, device=DEVICE) * np.log(case.vocabulary)).long() - 1
        total = torch.zeros((), device=DEVICE)
        for d in range(DIRECTIONS):
            h, targets, after = hidden(d, case.batch, carried[d])
            carried[d] = [(c.detach(), h.detach()) for c, h in after]
            nll = sampled_sum(h, rows, targets, drawn.clamp(0, case.vocabulary - 1), log_expected)
            total = total + nll / (DIRECTIONS * len(targets))
        total.backward()
        optimizer.step()
        return total.detach()

    def check() -> dict[str, np.ndarray]:
        total = 0.0
        with torch.no_grad():
            for d in range(DIRECTIONS):
                h, targets, _ = hidden(d, 2, model.zero_states(2))
                total += float(F.cross_entropy(F.linear(h, table, bias[:, 0]), targets)) / DIRECTIONS
        return {"loss": np.array(total)}

    def run(n: int) -> None:
        for _ in range(n):
            float(step())

    return Built(check, [(run, 1.0)])


# pyright: reportMissingImports=false


def build(case: Case, arrays: Arrays) -> Built:
    """PyTorch's side of a case."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    make = {
        "product": _product,
        "copy": _copy,
        "lstm": _lstm,
        "softmax": _softmax,
        "step": _step,
        "recipe": _recipe,
        "official": build_training,
        "embed": build_embedding,
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
            loss = sampled_sum(hidden, rows, targets, *sampled)
        else:
            loss = F.cross_entropy(F.linear(hidden, table, bias), targets, reduction="sum")
        loss.backward()
        return loss.detach()

    def check() -> dict[str, np.ndarray]:
        loss = step().cpu().numpy()
        return {"loss": loss} | {f"d:{n}": leaf.grad.cpu().numpy() for n, leaf in leaves.items()}  # type: ignore[union-attr]

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
