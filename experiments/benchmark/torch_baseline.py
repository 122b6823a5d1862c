"""PyTorch's implementations of the benchmark cases; PyTorch is optional, and this module needs no JAX.

A *stack* holds one direction's LSTM layers. `nn.LSTM(bidirectional=True)` is another model: it feeds both
directions into the second layer, which then reads the tokens that it should predict. The official model
runs a Python loop over time steps, as AllenNLP does, because no fused LSTM of PyTorch clips its cells.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.benchmark import cases
from experiments.benchmark.cases import CHARACTERS, DIRECTIONS, Arrays, Case, Workload

# pyright: reportMissingImports=false

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
State = tuple[Tensor, Tensor]  # c [B, H], h [B, P]


def _to_device(array: np.ndarray) -> Tensor:
    made = torch.from_numpy(np.ascontiguousarray(array)).to(_DEVICE)
    return made.long() if made.dtype == torch.int32 else made


def _repeat(step: Callable[[], Any]) -> Callable[[int], list[Any]]:
    """Return a function that calls `step` n times and waits for the device."""

    def run(n: int) -> list[Any]:
        out = [step() for _ in range(n)]
        if _DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    return run


def _autocast(case: Case) -> Any:
    """Return the context of the case's precision; on CUDA, autocast runs an LSTM in float16."""
    if case.precision == "bfloat16":
        return torch.autocast(_DEVICE, torch.bfloat16)
    return contextlib.nullcontext()


def build_machine(case: Case, arrays: Arrays) -> Workload:
    """Time a square matmul or a copy into existing memory."""
    x = _to_device(arrays["x"]).to(torch.bfloat16 if case.precision == "bfloat16" else torch.float32)
    out = torch.empty_like(x)
    step = lambda: torch.neg(x, out=out) if case.name == "copy" else torch.matmul(x, x, out=out)  # noqa: E731
    return Workload(lambda: {"rows": step()[:8].float().cpu().numpy()}, [(_repeat(step), 1.0)])


def _swap_gates(w: np.ndarray) -> np.ndarray:
    """Reorder elmo_jax's gates i, j, f, o on the last axis as PyTorch's i, f, g, o, or back."""
    i, j, f, o = np.split(w, 4, axis=-1)
    return np.concatenate([i, f, j, o], axis=-1)


def _make_stack(case: Case, arrays: Arrays, d: int) -> nn.LSTM:
    """Load one direction. PyTorch has two biases where one is enough; the second stays 0."""
    lstm = nn.LSTM(case.width, case.cells, case.layers)
    with torch.no_grad():
        for i in range(case.layers):
            w_x, w_h, bias = (
                torch.from_numpy(_swap_gates(arrays[f"lstm_{i}/{kind}"][d]))
                for kind in ("input_kernel", "recurrent_kernel", "bias")
            )
            bias[case.cells : 2 * case.cells] += 1  # elmo_jax adds the forget bias when it runs the cell
            lstm.get_parameter(f"weight_ih_l{i}").copy_(w_x.T)
            lstm.get_parameter(f"weight_hh_l{i}").copy_(w_h.T)
            lstm.get_parameter(f"bias_ih_l{i}").copy_(bias)
            lstm.get_parameter(f"bias_hh_l{i}").zero_().requires_grad_(False)
    lstm.to(_DEVICE).flatten_parameters()
    return lstm


def _read_gradients(case: Case, stacks: Any, gradient: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """Return the gradients of all layers under elmo_jax's names; `gradient` returns a parameter's."""
    names = (("input_kernel", "weight_ih"), ("recurrent_kernel", "weight_hh"), ("bias", "bias_ih"))
    read = lambda parameter: _swap_gates(gradient(parameter).float().cpu().numpy().T)  # noqa: E731
    return {
        f"d:lstm_{i}/{ours}": np.stack([read(stack.get_parameter(f"{theirs}_l{i}")) for stack in stacks])
        for i in range(case.layers)
        for ours, theirs in names
    }


def build_lstm(case: Case, arrays: Arrays) -> Workload:
    """Time forward and backward passes of `nn.LSTM`, one direction after the other."""
    stacks = [_make_stack(case, arrays, d) for d in range(DIRECTIONS)]
    xs = [_to_device(arrays["x"][:, d]).requires_grad_() for d in range(DIRECTIONS)]
    cotangents = [_to_device(arrays["cotangent"][:, d]) for d in range(DIRECTIONS)]

    def step() -> Tensor:
        total = torch.zeros((), device=_DEVICE)
        for stack, x, cotangent in zip(stacks, xs, cotangents, strict=True):
            stack.zero_grad()
            x.grad = None
            with _autocast(case):
                h, _ = stack(x)
            loss = (h.float() * cotangent).sum()
            loss.backward()
            total += loss.detach()
        return total

    def check() -> dict[str, np.ndarray]:
        return {"loss": step().cpu().numpy()} | _read_gradients(case, stacks, lambda p: p.grad)

    return Workload(check, [(_repeat(step), 1.0)])


def _sampled_loss(h: Tensor, rows: Any, targets: Tensor, negatives: Tensor, log_expected: Tensor) -> Tensor:
    """Return the summed loss of `elmo_jax.sampled_nll`; `rows` maps classes to vectors and biases."""
    vectors, biases = rows(targets)
    true = (h * vectors).sum(-1) + biases - log_expected[targets]
    vectors, biases = rows(negatives)
    noise = h @ vectors.T + (biases - log_expected[negatives])
    noise = noise.masked_fill(negatives[None] == targets[:, None], -1e30)
    return (torch.logsumexp(torch.cat([true[:, None], noise], 1), 1) - true).sum()


def build_softmax(case: Case, arrays: Arrays) -> Workload:
    """Time the loss and the gradients of a full or sampled softmax."""
    leaves = {n: _to_device(arrays[n]).requires_grad_() for n in ("hidden", "table", "bias")}
    hidden, table, bias = leaves.values()
    targets = _to_device(arrays["targets"])
    sampled = [_to_device(arrays[n]) for n in ("negatives", "log_expected")] if case.negatives else None

    def step() -> Tensor:
        for leaf in leaves.values():
            leaf.grad = None
        if sampled:
            loss = _sampled_loss(hidden, lambda ids: (table[ids], bias[ids]), targets, *sampled)
        else:
            loss = F.cross_entropy(F.linear(hidden, table, bias), targets, reduction="sum")
        loss.backward()
        return loss.detach()

    def check() -> dict[str, np.ndarray]:
        loss = step().cpu().numpy()
        return {"loss": loss} | {f"d:{n}": leaf.grad.cpu().numpy() for n, leaf in leaves.items()}  # type: ignore[union-attr]

    return Workload(check, [(_repeat(step), 1.0)])


class LanguageModel(nn.Module):
    """Token vectors, a stack for each direction, a full softmax (perhaps of the same table), and Adam."""

    def __init__(self, case: Case, arrays: Arrays):
        super().__init__()
        self.case, self.dropout = case, 0.0
        self.table = nn.Parameter(_to_device(arrays["embedder/table"]))
        self.softmax = self.table if case.tied else nn.Parameter(_to_device(arrays["softmax_table"]))
        self.bias = nn.Parameter(_to_device(arrays["softmax_bias"]))
        self.stacks = nn.ModuleList(_make_stack(case, arrays, d) for d in range(DIRECTIONS))
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, cases.LEARNING_RATE, fused=True)

    def forward(self, d: int, ids: Tensor, valid: Tensor) -> Tensor:
        """Return half the mean loss of a direction, for ids ``[T + 1, B]`` in the direction's order.

        `valid` holds the indices of valid targets among the T B; a GPU would wait to learn their number.
        """
        drop = lambda x: F.dropout(x, self.dropout) if self.dropout else x  # noqa: E731
        with _autocast(self.case):
            h = drop(self.stacks[d](drop(F.embedding(ids[:-1], self.table)))[0])
            logits = F.linear(h.flatten(0, 1).index_select(0, valid), self.softmax, self.bias)
        targets = ids[1:].flatten().index_select(0, valid)
        return F.cross_entropy(logits.float(), targets, reduction="mean") / DIRECTIONS

    def step(self, words: list[Tensor], valid: Tensor) -> Tensor:
        """Train on a batch; one direction's backward pass runs before the other's logits exist."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=_DEVICE)
        for d in range(DIRECTIONS):
            loss = self(d, words[d], valid)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        return total


def _order_words(words: np.ndarray, lengths: np.ndarray) -> tuple[list[Tensor], Tensor]:
    """Return ids ``[T + 1, B]`` in each direction's order, and the indices of valid targets."""
    backward = words.copy()
    for row, n in zip(backward, lengths, strict=True):
        row[:n] = row[:n][::-1]
    mask = np.arange(words.shape[1] - 1)[:, None] < lengths[None] - 1
    return [_to_device(w.T) for w in (words, backward)], _to_device(np.flatnonzero(mask))


def build_step(case: Case, arrays: Arrays) -> Workload:
    """Time training steps with the full softmax and fused Adam."""
    model = LanguageModel(case, arrays)
    run = _repeat(partial(model.step, *_order_words(arrays["words"], arrays["lengths"])))

    def first_gradient(p: Tensor) -> Tensor:
        return model.optimizer.state[p]["exp_avg"] / (1 - cases.ADAM_B1)  # after one step

    def check() -> dict[str, np.ndarray]:
        first = run(1)
        out = _read_gradients(case, model.stacks, first_gradient)
        out["d:softmax_bias"] = first_gradient(model.bias).cpu().numpy()
        return out | {"loss": np.array([float(loss) for loss in (*first, *run(2))])}

    return Workload(check, [(run, 1.0)])


def build_recipe(case: Case, arrays: Arrays) -> Workload:
    """Time the recipe with the full softmax; check its loss without dropout."""
    model = LanguageModel(case, arrays)
    bounds = arrays["bounds"].tolist()
    batches = [_order_words(arrays[f"words:{bound}"][0], arrays[f"lengths:{bound}"][0]) for bound in bounds]

    def check() -> dict[str, np.ndarray]:
        with torch.no_grad():
            words, valid = batches[0]
            loss = np.array(sum(float(model(d, words[d], valid)) for d in range(DIRECTIONS)))
        for module in (model, *model.stacks):
            module.dropout = 0.1  # type: ignore[assignment]
        return {"loss": loss}

    runs = [_repeat(partial(model.step, *batch)) for batch in batches]
    return Workload(check, list(zip(runs, arrays["steps"].tolist(), strict=True)))


class OfficialModel(nn.Module):
    """Character CNN and LSTM layers with clipped and projected cells."""

    def __init__(self, case: Case, arrays: Arrays):
        super().__init__()
        self.case, self.w = case, nn.ParameterDict()
        for name in filter(cases.is_weight, arrays):
            a, is_filter = arrays[name], name.startswith("embedder/filter_") and "bias" not in name
            # PyTorch's layout of convolutions, [filters, d, width], and of linear layers.
            a = a.transpose(2, 1, 0) if is_filter else a.swapaxes(-1, -2) if name.endswith("_kernel") else a
            parts = enumerate(a) if name.startswith("lstm") else [(None, a)]
            for d, values in parts:
                self.w[name if d is None else f"{name}:{d}"] = nn.Parameter(_to_device(values))

    def embed_words(self, ids: Tensor) -> Tensor:
        """Return the token vectors ``[N, P]`` of character ids ``[N, C]``."""
        table = self.w["embedder/characters"]
        table = torch.cat([table.new_zeros(1, table.shape[1]), table])
        x = F.embedding(ids, table).transpose(1, 2)  # [N, d, C]
        each = []
        for i in range(len(self.case.filters)):
            y = F.conv1d(x, self.w[f"embedder/filter_{i}"], self.w[f"embedder/filter_bias_{i}"])
            each.append(torch.relu(y.max(dim=-1).values))
        y = torch.cat(each, dim=-1)
        gate = torch.sigmoid(self._dense("carry_0", y))
        y = gate * torch.relu(self._dense("transform_0", y)) + (1 - gate) * y
        return self._dense("projection", y)

    def _dense(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"embedder/{name}_kernel"], self.w[f"embedder/{name}_bias"])

    def _run_layer(self, i: int, d: int, x: Tensor, lengths: list[int], state: State) -> tuple[Tensor, State]:
        """Run a layer in one direction over ``[B, T, P]``, rows by falling length; backward if d is 1."""
        kinds = ("input_kernel", "recurrent_kernel", "projection_kernel", "bias")
        w_x, w_h, w_p, b = (self.w[f"lstm_{i}/{kind}:{d}"] for kind in kinds)
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

    def run_direction(self, d: int, x: Tensor, lengths: list[int], states: list[State]) -> tuple[Any, Any]:
        """Return every layer's output ``[B, T, P]`` in one direction, and every layer's last state."""
        outputs, after = [], []
        for i in range(self.case.layers):
            h, last = self._run_layer(i, d, x, lengths, states[i])
            x = h + x if self.case.skip and i else h
            outputs.append(x)
            after.append(last)
        return outputs, after

    def zero_states(self, rows: int) -> list[State]:
        """Return the initial state of every layer of a direction."""
        c, h = (torch.zeros((rows, size), device=_DEVICE) for size in (self.case.cells, self.case.width))
        return [(c, h)] * self.case.layers


def character_ids(word: str) -> list[int]:
    """Return a word's 50 character ids."""
    inner = [byte + 1 for byte in word.encode("utf-8", "ignore")[: CHARACTERS - 2]]
    ids = [259, *{"<S>": [257], "</S>": [258]}.get(word, inner), 260]
    return ids + [261] * (CHARACTERS - len(ids))


def _embed(model: OfficialModel, sentences: list[list[str]]) -> list[np.ndarray]:
    """Return float32 ``[L, tokens, 2P]`` for each sentence."""
    order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
    lengths = [len(sentences[i]) + 2 for i in order]
    ids = np.zeros((len(order), lengths[0], CHARACTERS), np.int64)
    for row, i in enumerate(order):
        ids[row, : lengths[row]] = [character_ids(word) for word in ("<S>", *sentences[i], "</S>")]
    with torch.inference_mode():
        x = model.embed_words(_to_device(ids).reshape(-1, CHARACTERS))
        x = x.reshape(len(order), lengths[0], -1)
        zero = model.zero_states(len(order))
        both = [[x, *model.run_direction(d, x, lengths, zero)[0]] for d in range(DIRECTIONS)]
        layers = torch.stack([torch.cat(pair, dim=-1) for pair in zip(*both, strict=True)]).cpu().numpy()
    out: list[Any] = [None] * len(order)
    for row, i in enumerate(order):
        out[i] = layers[:, row, 1 : lengths[row] - 1]
    return out


def build_embed(case: Case, arrays: Arrays) -> Workload:
    """Time the embedding of a text in batches of 64 sentences."""
    model, text = OfficialModel(case, arrays), cases.split_sentences(arrays)
    embed_all = lambda: [a for i in range(0, len(text), 64) for a in _embed(model, text[i : i + 64])]  # noqa: E731
    return Workload(lambda: {"layers": np.concatenate(embed_all(), axis=1)}, [(_repeat(embed_all), 1.0)])


def build_official(case: Case, arrays: Arrays) -> Workload:
    """Time steps over a window with carried state and the sampled softmax; check the full softmax.

    Gradients of the softmax are sparse, and so Adagrad updates only the rows that a step uses.
    """
    model = OfficialModel(case, arrays)
    chars, words, weight = (_to_device(arrays[name]) for name in ("chars", "words", "weight"))
    carried = [model.zero_states(case.batch) for _ in range(DIRECTIONS)]
    bias = nn.Parameter(model.w.pop("softmax_bias").detach()[:, None])  # [V, 1], for the sparse lookup
    table = model.w.pop("softmax_table")
    groups = [{"params": list(model.parameters())}, {"params": [table, bias]}]  # dense and sparse
    torch.sparse.check_sparse_tensor_invariants.disable()  # PyTorch warns if this is left unset
    optimizer = torch.optim.Adagrad(groups, cases.LEARNING_RATE, initial_accumulator_value=1.0, eps=1e-7)
    k = torch.arange(case.vocabulary, device=_DEVICE, dtype=torch.float64)
    expected = torch.log((k + 2) / (k + 1)) / np.log(case.vocabulary + 1) * (case.negatives or 0)
    log_expected = expected.log().float()

    def hidden(d: int, rows: int, states: list[State]) -> tuple[Tensor, Tensor, list[State]]:
        ids = chars[:, d, :rows]  # [U, B, C] in the direction's order
        x = model.embed_words(ids.reshape(-1, CHARACTERS)).reshape(*ids.shape[:2], -1).transpose(0, 1)
        # The window is in the direction's order; backward layers expect reading order.
        x = x.flip(1) if d else x
        outputs, after = model.run_direction(d, x, [x.shape[1]] * rows, states)
        h = outputs[-1].flip(1) if d else outputs[-1]
        mask = weight[:, d, :rows].T.reshape(-1) > 0
        return h.reshape(-1, h.shape[-1])[mask], words[1:, d, :rows].T.reshape(-1)[mask], after

    def rows(ids: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, table, sparse=True), F.embedding(ids, bias, sparse=True)[:, 0]

    def step() -> float:
        optimizer.zero_grad()
        uniform = torch.rand(case.negatives or 1, device=_DEVICE)
        negatives = (torch.exp(uniform * np.log(case.vocabulary)).long() - 1).clamp(0, case.vocabulary - 1)
        total = torch.zeros((), device=_DEVICE)
        for d in range(DIRECTIONS):
            h, targets, after = hidden(d, case.batch, carried[d])
            carried[d] = [(c.detach(), h.detach()) for c, h in after]
            loss = _sampled_loss(h, rows, targets, negatives, log_expected)
            total = total + loss / (DIRECTIONS * len(targets))
        total.backward()
        optimizer.step()
        return float(total.detach())

    def check() -> dict[str, np.ndarray]:
        total = 0.0
        with torch.no_grad():
            for d in range(DIRECTIONS):
                h, targets, _ = hidden(d, 2, model.zero_states(2))
                total += float(F.cross_entropy(F.linear(h, table, bias[:, 0]), targets)) / DIRECTIONS
        return {"loss": np.array(total)}

    return Workload(check, [(_repeat(step), 1.0)])
