"""The transformer once more, in numpy float64, written from the specification alone: loops over samples, frames, positions.

Nothing is shared with vchitect_fast but the state dict. Slow and literal on purpose: it is what the model is held against.
"""

from __future__ import annotations

import numpy as np


def forward(config, state, latents, text, pooled, timestep):
    """State dict of numpy float64 arrays; returns [B, T, c, h, w]."""
    return np.stack(
        [_one_sample(config, state, latents[b], text[b], pooled[b], float(timestep[b])) for b in range(len(latents))]
    )


def _linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _silu(x):
    return x / (1 + np.exp(-x))


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def _softmax_attention(q, k, v):
    """[L, C], [M, C], [M, C] -> [L, C]."""
    score = q @ k.T / np.sqrt(q.shape[-1])
    weight = np.exp(score - score.max(-1, keepdims=True))
    return (weight / weight.sum(-1, keepdims=True)) @ v


def _rotate(x, frame, scaling):
    """One vector [C] at one frame: complex multiplication of the interleaved pairs."""
    channels = x.shape[-1]
    pairs = x[0::2] + 1j * x[1::2]
    angle = (frame / scaling) * 1e6 ** (-2 * np.arange(channels // 2) / channels)
    turned = pairs * np.exp(1j * angle)
    out = np.empty(channels)
    out[0::2], out[1::2] = turned.real, turned.imag
    return out


def _position(config):
    """The grid [M, M, D], row-major, columns coded in the first half."""
    side, width = config.pos_embed_max_size, config.hidden_dim
    code = np.empty((side, width // 2))
    for index in range(side):
        where = index / (side / (config.sample_size // config.patch_size))
        angle = where / 10000 ** (np.arange(width // 4) / (width / 4))
        code[index] = np.concatenate([np.sin(angle), np.cos(angle)])
    grid = np.empty((side, side, width))
    for row in range(side):
        for column in range(side):
            grid[row, column] = np.concatenate([code[column], code[row]])
    return grid


def _one_sample(config, state, latents, text, pooled, t):
    frames, _, height, width = latents.shape
    p, d, heads = config.patch_size, config.hidden_dim, config.num_attention_heads
    rows, columns, side = height // p, width // p, config.pos_embed_max_size
    top, left = (side - rows) // 2, (side - columns) // 2
    grid = _position(config)
    kernel, bias = state["pos_embed.proj.weight"], state["pos_embed.proj.bias"]

    x = np.empty((frames, rows * columns, d))
    for f in range(frames):
        for r in range(rows):
            for c in range(columns):
                patch = latents[f, :, r * p : (r + 1) * p, c * p : (c + 1) * p]
                x[f, r * columns + c] = (kernel * patch).sum((1, 2, 3)) + bias + grid[top + r, left + c]

    angle = t * np.exp(-np.log(10000) * np.arange(128) / 128)
    code = np.concatenate([np.cos(angle), np.sin(angle)])
    name = "time_text_embed."
    temb = _linear(
        state, name + "timestep_embedder.linear_2", _silu(_linear(state, name + "timestep_embedder.linear_1", code))
    )
    temb = temb + _linear(
        state, name + "text_embedder.linear_2", _silu(_linear(state, name + "text_embedder.linear_1", pooled))
    )
    c = np.repeat(_linear(state, "context_embedder", text)[None], frames, axis=0)

    for i in range(config.num_layers):
        x, c = _block(config, state, f"transformer_blocks.{i}.", x, c, temb, last=i == config.num_layers - 1)

    scale, shift = np.split(_linear(state, "norm_out.linear", _silu(temb)), 2)
    y = _linear(state, "proj_out", _norm(x) * (1 + scale) + shift)
    out = np.empty((frames, config.out_channels, height, width))
    for r in range(rows):
        for k in range(columns):
            patch = y[:, r * columns + k].reshape(frames, p, p, config.out_channels)
            out[:, :, r * p : (r + 1) * p, k * p : (k + 1) * p] = patch.transpose(0, 3, 1, 2)
    del heads
    return out


def _block(config, state, prefix, x, c, temb, *, last):
    m = np.split(_linear(state, prefix + "norm1.linear", _silu(temb)), 6)
    n = np.split(_linear(state, prefix + "norm1_context.linear", _silu(temb)), 2 if last else 6)
    scale_c, shift_c = (n[0], n[1]) if last else (n[1], n[0])
    ax, ac = _attention(
        config, state, prefix + "attn.", _norm(x) * (1 + m[1]) + m[0], _norm(c) * (1 + scale_c) + shift_c, last
    )

    def feed(name, y):
        return _linear(state, name + ".net.2", _gelu(_linear(state, name + ".net.0.proj", y)))

    x = x + m[2] * ax
    x = x + m[5] * feed(prefix + "ff", _norm(x) * (1 + m[4]) + m[3])
    if last:
        return x, None
    c = c + n[2] * ac
    c = c + n[5] * feed(prefix + "ff_context", _norm(c) * (1 + n[4]) + n[3])
    return x, c


def _attention(config, state, prefix, x, c, last):
    frames, tokens = x.shape[:2]
    heads, dim = config.num_attention_heads, config.attention_head_dim
    text = {k: _linear(state, f"{prefix}add_{k}_proj", c) for k in "qkv"}

    def joint(kind, suffix=""):
        return np.concatenate([_linear(state, f"{prefix}to_{kind}{suffix}", x), text[kind]], axis=1)

    spatial, temporal, cross = (np.empty((frames, tokens + c.shape[1], heads * dim)) for _ in range(3))
    q, k, v = joint("q"), joint("k"), joint("v")
    qt, kt, vt = joint("q", "_temp"), joint("k", "_temp"), joint("v", "_temp")
    qc = joint("q", "_cross")
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        for f in range(frames):
            spatial[f, :, part] = _softmax_attention(q[f, :, part], k[f, :, part], v[f, :, part])
            cross[f, :, part] = _softmax_attention(qc[f, :, part], text["k"][0, :, part], text["v"][0, :, part])
        for j in range(tokens + c.shape[1]):
            turn = lambda y: np.stack([_rotate(y[f, j, part], f, config.rope_scaling_factor) for f in range(frames)])  # noqa: B023, E731
            temporal[:, j, part] = _softmax_attention(turn(qt), turn(kt), vt[:, j, part])
    y = 1.1 * spatial + _linear(state, prefix + "to_out_context", cross)
    weight = 0.0 if frames == 1 else 1.0
    ax = _linear(state, prefix + "to_out.0", y[:, :tokens]) + weight * _linear(
        state, prefix + "to_out_temporal", temporal[:, :tokens]
    )
    if last:
        return ax, None
    ac = _linear(state, prefix + "to_add_out", y[:, tokens:])
    return ax, ac + weight * _linear(state, prefix + "to_add_out_temporal", temporal[:, tokens:])
