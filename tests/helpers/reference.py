"""NumPy float64 reference implementations that follow the papers' equations step by step."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, w_x, w_h, b, w_p=None, c=None, h=None, cell_clip=np.inf, proj_clip=np.inf):
    """Return c [T, H] and h [T, P] of one direction for one row x [T, I]."""
    cells = w_h.shape[1] // 4
    c = np.zeros(cells) if c is None else c
    h = np.zeros(w_h.shape[0]) if h is None else h
    cs, hs = [], []
    for x_t in x:
        i, j, f, o = np.split(x_t @ w_x + h @ w_h + b, 4)
        c = np.clip(sigmoid(f + 1) * c + sigmoid(i) * np.tanh(j), -cell_clip, cell_clip)
        m = sigmoid(o) * np.tanh(c)
        h = np.clip(m if w_p is None else m @ w_p, -proj_clip, proj_clip)
        cs.append(c)
        hs.append(h)
    return np.array(cs), np.array(hs)


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def tree64(tree):
    return {k: tree64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def bilm(params, ids):
    """Return layers [L, T, F] and -log p of each direction's targets, for ids with <S> and </S>."""
    p = tree64(params)
    table = p["embedder"]["table"]
    layers = sum(name.startswith("lstm") for name in p)
    halves, nlls = [], []
    for d, read in enumerate((ids, ids[::-1])):
        x = table[read]
        states = [x]
        for layer in range(layers):
            w = p[f"lstm_{layer}"]
            w_p = w["projection_kernel"][d] if "projection_kernel" in w else None
            x = lstm(x, w["input_kernel"][d], w["recurrent_kernel"][d], w["bias"][d], w_p)[1]
            states.append(x)
        log_p = log_softmax(x[:-1] @ p.get("softmax_table", table).T + p["softmax_bias"])
        nlls.append(-log_p[np.arange(len(read) - 1), read[1:]])
        halves.append(np.stack(states)[:, :: -1 if d else 1])
    return np.concatenate(halves, -1), nlls


def characters(word):
    """Return the official character ids of a word, without the + 1."""
    marker = {"<S>": [256], "</S>": [257]}
    inside = marker.get(word) or list(word.encode())[:48]
    return ([258, *inside, 259] + [260] * 50)[:50]


def char_cnn(file, words, activation):
    """Return token vectors [N, E] of words, from the datasets of an official file."""
    f = {name: np.asarray(a, np.float64) for name, a in file.items()}
    act = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}[activation]
    out = []
    for word in words:
        x = f["char_embed"][characters(word)]  # [50, d]
        parts = []
        for i in range(sum(name.startswith("CNN/W") for name in f)):
            w = f[f"CNN/W_cnn_{i}"][0]
            steps = range(len(x) - len(w) + 1)
            y = np.array([np.einsum("kd,kdn->n", x[t : t + len(w)], w) for t in steps]) + f[f"CNN/b_cnn_{i}"]
            parts.append(act(y.max(0)))
        y = np.concatenate(parts)
        for k in range(sum(name.endswith("W_carry") for name in f)):
            h = {
                name: f[f"CNN_high_{k}/{name}"]
                for name in ("W_carry", "b_carry", "W_transform", "b_transform")
            }
            g = sigmoid(y @ h["W_carry"] + h["b_carry"])
            y = g * np.maximum(y @ h["W_transform"] + h["b_transform"], 0) + (1 - g) * y
        if "CNN_proj/W_proj" in f:
            y = y @ f["CNN_proj/W_proj"] + f["CNN_proj/b_proj"]
        out.append(y)
    return np.array(out)


def official(options, file, sentence, state=None):
    """Return layers [L, T, 2P] of a sentence by the official format, and the last states."""
    tokens = ["<S>", *sentence, "</S>"]
    lstm_options = options["lstm"]
    clips = lstm_options.get("cell_clip") or np.inf, lstm_options.get("proj_clip") or np.inf
    vectors = char_cnn(file, tokens, options["char_cnn"]["activation"])
    halves, after = [], {}
    for d in (0, 1):
        x = vectors[::-1] if d else vectors
        layers = [x]
        for layer in range(lstm_options["n_layers"]):
            prefix = f"RNN_{d}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
            w = {name: np.asarray(file.get(prefix + name), np.float64) for name in ("W_0", "B")}
            w_p = file.get(prefix + "W_P_0")
            w_p = None if w_p is None else np.asarray(w_p, np.float64)
            n = x.shape[1]
            c, h = (state or {}).get((d, layer), (None, None))
            cs, hs = lstm(x, w["W_0"][:n], w["W_0"][n:], w["B"], w_p, c, h, *clips)
            after[d, layer] = cs[-1], hs[-1]
            x = hs + x if lstm_options.get("use_skip_connections") and layer else hs
            layers.append(x)
        halves.append(np.stack(layers)[:, :: -1 if d else 1])
    return np.concatenate(halves, -1)[:, 1:-1], after
