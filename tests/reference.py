"""NumPy float64 oracles, written as the papers' equations read: one row and one step at a time."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(x, w_x, w_h, b, w_p=None, c=None, h=None, cell_clip=np.inf, proj_clip=np.inf):
    """One direction, one row: x [T, I] to c [T, H] and h [T, P]."""
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
    """One document with <S> and </S>: layers [L, T, F], and -log p of each direction's targets."""
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
