"""A block as one hand-written forward and backward, in place in shared buffers: blocks.py defines the answer.

    qkv [rows, 7D and 3D] -> attentions [rows, 3D] -> y = x + gate branch_sum -> mlp_pre [rows, 4D] -> y + gate fc2(gelu)
Saved by group: block_input; qkv; branch_out (spatial, cross, and y in the slot where temporal was); mlp_pre; stats (the
log-sum-exp of two attentions). Made again in backward: normed rows, GELU's output, and the temporal branch, which is a pass
over memory where y is a product of K = 3D. What a Policy recomputes or moves (`recomputed`, `hand_over`) is rebuilt or
restored first. A gated product is neither saved nor made again and no gated rows are written: kernels/gated_weight.py.
Visual and text rows are never joined; gradients of the attentions go straight into buffers like qkv. Text q, k, v serve
three branches: spatial writes their gradients, cross (of k, v the first frame's) and then temporal add, in this order.
Refused: second derivatives, autocast, mixed dtypes, no branch at all; torch.compile runs it outside its graph. No speed was
measured. The steps, in plain torch or on the kernels: steps.py; where things lie: block_layout.py.

Letters: B batch, T frames, S visual tokens a frame, N text tokens, L rows of one sample, D hidden, H heads, C head dim,
K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vchitect_fast.errors import UserError
from vchitect_fast.kernels._op import rows as readable
from vchitect_fast.model.block_layout import CONTEXT, GROUPS, STREAMS, Layout, Stream, layout_of
from vchitect_fast.model.blocks import NORM_EPS, SPATIAL_WEIGHT, Block
from vchitect_fast.model.fp8_steps import fp8_steps_of
from vchitect_fast.model.steps import Operand, Steps, steps_of, wide
from vchitect_fast.plan import Policy

Tensors = tuple[Tensor, ...]
Optional = Sequence[Tensor | None]  # what may be missing: a branch that is off, the last block's text
HandOver = Callable[[Sequence[str]], AbstractContextManager[Any]]
KEEP_ALL = Policy.keep()


@torch.compiler.disable(reason="the hand-written block launches its kernels itself")
def handwritten_block(
    block: Block,
    x_BTSD: Tensor,
    c_BTND: Tensor,
    temb_BD: Tensor,
    *,
    impl: str,
    fp8: bool = False,
    policy: Policy = KEEP_ALL,
    hand_over: HandOver | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What block(x, c, temb) returns; impl "triton" or "reference" names who computes the steps.

    fp8        its linears in fp8 (fp8_steps.py)
    policy     its groups to recompute are not saved
    hand_over  a context to save in: the first saved tensors are of the groups that it is given by name, in that order
    """
    names, parameters = zip(*block.named_parameters(), strict=True)
    # One copy where rows lie as columns: those of the patch embedding.
    x_BTSD, c_BTND, temb_BD = map(readable, (x_BTSD, c_BTND, temb_BD))
    layout = layout_of(block, x_BTSD, c_BTND, temb_BD, names, policy)
    steps = fp8_steps_of(impl) if fp8 else steps_of(impl)
    steps.check(x_BTSD, c_BTND, layout.num_heads)
    with hand_over(layout.saved_groups()) if hand_over else nullcontext(), torch.cuda.device_of(x_BTSD):
        return _HandWritten.apply(layout, steps, x_BTSD, c_BTND, temb_BD, *parameters)


class _HandWritten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, at: Layout, steps: Steps, x_BTSD: Tensor, c_BTND: Tensor, temb_BD: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        p = dict(zip(at.names, parameters, strict=True))
        rows, m = _rows(x_BTSD, c_BTND), _modulation(p, F.silu(temb_BD))
        qkv = _project(steps, at, p, rows, m)
        branch, lse = _attend(steps, at, qkv)
        outs: list[Tensor | None] = [None, None]
        pre: list[Tensor | None] = [None, None]
        for i in at.streams:
            s, gate_mlp = STREAMS[i], m[i].chunk(6, dim=1)[5]
            n, y = _summed(steps, at, p, i, rows[i], branch[i], m[i])
            pre[i] = hidden = steps.linear(n, steps.operand(p[f"{s.first}.weight"]))
            second, bias = _linear(p, s.second)
            outs[i] = steps.linear(_gelu(steps, p, s, hidden), steps.operand(second), bias)
            steps.residual(y, outs[i], gate_mlp)
        groups = {
            "block_input": (x_BTSD, c_BTND),
            "qkv": qkv,
            "branch_out": (branch[0], None if at.last else branch[1]),
            "mlp_pre": tuple(pre),
            "stats": lse,
        }
        kept = [None if name in at.recomputed else tensor for name in GROUPS for tensor in groups[name]]
        ctx.save_for_backward(*kept, temb_BD, *parameters)
        ctx.at, ctx.steps = at, steps
        x, c = (None if out is None else out.view(like.shape) for out, like in zip(outs, (x_BTSD, c_BTND), strict=True))
        return x, c  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError(
                "the hand-written block has no second derivative, got a backward with create_graph=True; differentiate "
                "twice with model.set_kernels(None)."
            )
        at, steps = ctx.at, ctx.steps
        x_BTSD, c_BTND, *kept, temb_BD = ctx.saved_tensors[: 2 * len(GROUPS) + 1]
        p = dict(zip(at.names, ctx.saved_tensors[2 * len(GROUPS) + 1 :], strict=True))
        rows, m = _rows(x_BTSD, c_BTND), _modulation(p, F.silu(temb_BD))
        qkv, pre = tuple(kept[:2]), kept[4:6]
        branch: Optional = kept[2:4]
        lse: Optional = kept[6:]
        if "qkv" in at.recomputed:
            qkv = _project(steps, at, p, rows, m)
        if {"branch_out", "stats"} & at.recomputed:
            branch, lse = _attend(steps, at, qkv)
            for i in at.streams:
                _summed(steps, at, p, i, rows[i], branch[i], m[i])
        temporal = _temporal(steps, at, qkv)
        grads: dict[str, Tensor] = {}
        dm = [torch.empty_like(one) for one in m]
        dys: list[Tensor | None] = [None, None]
        dbranch: list[Tensor | None] = [None, None]
        for i in at.streams:
            (dout,) = _rows(douts[i])
            outputs = [branch[i], *temporal[i : i + 1]]
            dys[i], dbranch[i] = _stream_backward(steps, at, p, i, outputs, pre[i], dout, m[i], dm[i], grads)
        del temporal
        dqkv = _attend_backward(steps, at, qkv, branch, lse, dbranch)
        dx, dc = _project_backward(steps, at, p, rows, m, dqkv, dys, dm, grads)
        dtemb = _modulation_backward(p, temb_BD, dm, grads)
        grads |= {name: torch.zeros_like(p[name]) for name in at.names if name.rpartition(".")[0] in at.zero}
        found = (grads[name].to(p[name].dtype) if name in grads else None for name in at.names)
        return None, None, dx.view(x_BTSD.shape), dc.view(c_BTND.shape), dtemb, *found


def _modulation(p: dict[str, Tensor], silu_BD: Tensor) -> Tensors:
    """[B, 6 D] of the visual and of the text rows; the last block's text has [B, 2 D], scale first."""
    return tuple(F.linear(silu_BD, *_linear(p, s.modulation)) for s in STREAMS)


def _modulation_backward(p: dict[str, Tensor], temb_BD: Tensor, dm: list[Tensor], grads: dict[str, Tensor]) -> Tensor:
    silu_BD = F.silu(temb_BD)
    for s, one in zip(STREAMS, dm, strict=True):
        grads[f"{s.modulation}.weight"], grads[f"{s.modulation}.bias"] = one.T @ silu_BD, one.sum(0, dtype=wide(one))
    weights = [p[f"{s.modulation}.weight"] for s in STREAMS]
    return torch.ops.aten.silu_backward(torch.addmm(dm[0] @ weights[0], dm[1], weights[1]), temb_BD)


def _first_norm(at: Layout, m: Tensors, i: int) -> tuple[int, int]:
    """Which chunks of m[i] are shift and scale of the first norm."""
    return (1, 0) if at.last and i == 1 else (0, 1)


def _normed(steps: Steps, at: Layout, rows: Tensors, m: Tensors, i: int) -> tuple[Operand, Tensor, Tensor, Tensor]:
    """norm(rows), its scale, mean and rstd."""
    D = rows[i].shape[-1]
    shift, scale = (m[i][:, j * D : (j + 1) * D] for j in _first_norm(at, m, i))
    n, mean, rstd = steps.norm(rows[i], shift, scale, NORM_EPS)
    return n, scale, mean, rstd


def _project(steps: Steps, at: Layout, p: dict[str, Tensor], rows: Tensors, m: Tensors) -> Tensors:
    """The merged projections, [B, L, 7 D] of the visual and [B, L, 3 D] of the text rows."""
    normed = (_normed(steps, at, rows, m, i)[0] for i in range(2))
    linears = ([_side_by_side(p, names, kind) for kind in ("weight", "bias")] for names in at.projections)
    return tuple(steps.linear(n, steps.operand(w), b) for n, (w, b) in zip(normed, linears, strict=True))


def _side_by_side(p: dict[str, Tensor], names: tuple[str, ...], kind: str) -> Tensor:
    """The parameters of a merged projection in one buffer, one launch."""
    parts = [p[f"attn.{name}.{kind}"] for name in names]
    buffer = parts[0].new_empty(len(parts), *parts[0].shape)
    torch._foreach_copy_(list(buffer.unbind()), parts)
    return buffer.flatten(0, 1)


def _project_backward(
    steps: Steps, at: Layout, p: dict[str, Tensor], rows: Tensors, m: Tensors, dqkv: Tensors, dys: Sequence[Tensor | None],
    dm: list[Tensor], grads: dict[str, Tensor],
) -> list[Tensor]:  # fmt: skip
    """dx and dc; dys are what reached the rows past the attentions."""
    found = []
    for i, names in enumerate(at.projections):
        n, scale, mean, rstd = _normed(steps, at, rows, m, i)
        weight, dbiases = _side_by_side(p, names, "weight"), dqkv[i].sum((0, 1), dtype=wide(dqkv[i]))
        dweights, d, dn = torch.empty_like(weight), steps.operand(dqkv[i]), _over(n)
        steps.weight_gradient(d, [n], dweights)
        for name, dweight, dbias in zip(names, dweights.chunk(len(names)), dbiases.chunk(len(names)), strict=True):
            grads[f"attn.{name}.weight"], grads[f"attn.{name}.bias"] = dweight, dbias
        steps.input_gradient(d, steps.operand(weight), dn)
        sums = steps.norm_backward(dn, rows[i], scale, mean, rstd, dys[i])  # dn is dx from here on
        for j, total in zip(_first_norm(at, m, i), sums, strict=False):
            dm[i].unflatten(1, (-1, dn.shape[-1]))[:, j] = total
        found.append(dn)
    return found


def _attend(steps: Steps, at: Layout, qkv: Tensors) -> tuple[Tensors, Optional]:
    """The branches side by side, [B, L, 3 D] of the visual and of the text rows; the statistics of spatial and cross."""
    visual, text = (at.slots(x, len(names)) for x, names in zip(qkv, at.projections, strict=True))
    columns = at.num_outputs * qkv[0].shape[-1] // len(at.visual)
    branch = tuple(x.new_empty(*x.shape[:2], columns) for x in qkv)
    lse: dict[str, Tensor | None] = {"spatial": None, "cross": None}
    for name, *out in zip(at.branches, *(at.slots(x, at.num_outputs) for x in branch), strict=False):
        own = at.of(name, visual)
        if name == "spatial":
            lse[name] = steps.spatial_attention(own, text, out)
        elif name == "cross":
            lse[name] = steps.cross_attention(_first_keys(own, text), out)
        else:
            steps.temporal_attention(own, text, at.rope_scaling_factor, out)
    return branch, (lse["spatial"], lse["cross"])


def _temporal(steps: Steps, at: Layout, qkv: Tensors) -> list[Tensor]:
    """The temporal branch once more, [B, L, D] of the visual and of the text rows; nothing where it is not computed."""
    if "temporal" not in at.branches:
        return []
    visual, text = (at.slots(x, len(names)) for x, names in zip(qkv, at.projections, strict=True))
    made = [x.new_empty(*x.shape[:2], x.shape[2] // len(names)) for x, names in zip(qkv, at.projections, strict=True)]
    out = [at.slots(x, 1)[0] for x in made]
    steps.temporal_attention(at.of("temporal", visual), text, at.rope_scaling_factor, out)
    return made


def _summed(
    steps: Steps, at: Layout, p: dict[str, Tensor], i: int, x: Tensor, branch: Tensor, m: Tensor
) -> tuple[Operand, Tensor]:
    """norm(y) and y = x + gate branch_sum, which takes the last slot of the branch outputs."""
    _, _, gate, shift, scale, _ = m.chunk(6, dim=1)
    weight, bias = _merged(at, p, STREAMS[i])
    D, K = weight.shape
    total = steps.linear(steps.operand(branch[..., :K]), steps.operand(weight), bias)
    y = branch[..., -D:]
    n, _, _ = steps.residual_norm(x, total, gate, shift, scale, NORM_EPS, y)
    return n, y


def _attend_backward(
    steps: Steps, at: Layout, qkv: Tensors, branch: Optional, lse: Optional, dbranch: Optional
) -> Tensors:
    """Gradients of both merged projections, in buffers like theirs."""
    dqkv = tuple(torch.empty_like(x) for x in qkv)
    visual, text, dvisual, dtext = (
        at.slots(x, len(names)) for pair in (qkv, dqkv) for x, names in zip(pair, at.projections, strict=True)
    )
    nothing = torch.zeros_like(text[0][0, 0, 0, 0]).expand(text[0].shape)  # the last block drops its text rows: C zeros

    def columns(pair: Optional, num: int) -> list[Tensors]:
        """The visual and the text part of each slot."""
        return list(zip(*((nothing,) * num if x is None else at.slots(x, num) for x in pair), strict=True))

    outs = columns((branch[0], None if at.last else branch[1]), at.num_outputs)
    douts = columns(dbranch, len(at.branches))
    for k, name in enumerate(at.branches):
        own, down, add = at.of(name, visual), at.of(name, dvisual), k > 0
        if name == "spatial":
            steps.spatial_backward(douts[k], own, text, outs[k], lse[0], down, dtext, add)
        elif name == "cross":
            if not add:  # spatial is switched off: nobody else writes the keys of the later frames
                for unread in dtext[1:]:
                    unread[:, 1:] = 0
            steps.cross_backward(douts[k], _first_keys(own, text), outs[k], lse[1], _first_keys(down, dtext), add)
        else:
            steps.temporal_backward(douts[k], own, text, at.rope_scaling_factor, down, dtext, add)
    return dqkv


def _first_keys(own: Tensors, text: Tensors) -> Tensors:
    """What the cross branch reads: its queries, and the first frame's text keys and values."""
    return *own, text[0], text[1][:, 0], text[2][:, 0]


def _stream_backward(
    steps: Steps,
    at: Layout,
    p: dict[str, Tensor],
    i: int,
    outputs: list[Tensor],
    pre: Tensor | None,
    dout: Tensor,
    m: Tensor,
    dm: Tensor,
    grads: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Through MLP, second norm, gate and branch sum: the gradients of y and of the branches.

    outputs   what was saved of the branches, y in the last slot, and the temporal branch
    """
    s, (_, _, gate, shift, scale, gate_mlp) = STREAMS[i], m.chunk(6, dim=1)
    D = m.shape[1] // 6
    outputs[0], y = outputs[0][..., :-D], outputs[0][..., -D:]
    n, mean, rstd = steps.norm(y, shift, scale, NORM_EPS)
    weight, bias = _linear(p, s.first)
    first = steps.operand(weight)
    pre = steps.linear(n, first) if pre is None else pre
    h = _gelu(steps, p, s, pre)
    dh, total = _over(h), dout.sum(1, dtype=wide(dout))
    dweight, dbias, dgate_mlp = _gated_backward(steps, dout, [h], gate_mlp, _linear(p, s.second), total, dh)
    grads[f"{s.second}.weight"], grads[f"{s.second}.bias"] = dweight, dbias
    grads[f"{s.first}.bias"], dpre = steps.gelu_backward(dh.flatten(0, 1), pre.flatten(0, 1), bias)
    grads[f"{s.first}.weight"] = torch.empty_like(weight)
    steps.weight_gradient(dpre, [n], grads[f"{s.first}.weight"])
    dy = _over(n)
    steps.input_gradient(dpre, first, dy)
    dshift, dscale, total = steps.norm_backward(dy, y, scale, mean, rstd, dout)  # dy is one from here on
    merged = _merged(at, p, s)
    dbranch = dy.new_empty(*dy.shape[:2], merged[0].shape[1])
    parts = [steps.operand(x) for x in outputs]
    dmerged, dbias, dgate = _gated_backward(steps, dy, parts, gate, merged, total, dbranch)
    _merged_backward(at, p, s, dmerged, dbias, grads)
    for j, value in enumerate((dgate, dshift, dscale, dgate_mlp)):
        dm.unflatten(1, (6, -1))[:, 2 + j] = value
    return dy, dbranch


def _gated_backward(
    steps: Steps,
    d_BLD: Tensor,
    x_BLK: Sequence[Operand],
    gate_BD: Tensor,
    linear: tuple[Tensor, Tensor],
    total_BD: Tensor,
    dx_BLK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of gate (x W^T + b), given d and its sum over rows: writes dx, which may be x; returns dW, db, dgate.

    x in parts whose columns follow each other.
    """
    (weight, bias), d = linear, steps.operand(d_BLD)
    gated, dgate = torch.empty_like(weight), torch.empty_like(total_BD)
    dweight: Tensor | None = None
    for b in range(d_BLD.shape[0]):
        product = torch.empty_like(weight)
        steps.weight_gradient(d[b], [x[b] for x in x_BLK], product)
        if dweight is None:  # of several samples the sum is wide
            dweight = product if len(d_BLD) == 1 else torch.empty_like(product, dtype=total_BD.dtype)
        steps.gate_weights(product, weight, gate_BD[b], gated, dweight, dgate[b], b > 0)
        steps.input_gradient(d[b], steps.operand(gated), dx_BLK[b])
    assert dweight is not None
    return dweight, (gate_BD * total_BD).sum(0), dgate.addcmul_(total_BD, bias.to(total_BD.dtype))


def _merged(at: Layout, p: dict[str, Tensor], s: Stream) -> tuple[Tensor, Tensor]:
    """Weight [w Wo | Wo Wc | Wt] and bias of the branch sum, over the branches that are computed (branch_sum.py)."""
    (Wo, bo), (Wc, bc), (Wt, bt) = (_linear(p, name) for name in (s.out, CONTEXT, s.out_temporal))
    D = Wo.shape[0]
    weight, bias = Wo.new_empty(D, D * len(at.branches)), bo.to(wide(bo))
    for name, part in zip(at.branches, weight.split(D, dim=1), strict=True):
        if name == "spatial":
            torch.mul(Wo, SPATIAL_WEIGHT, out=part)
        elif name == "cross":
            torch.mm(Wo, Wc, out=part)
            bias = bias + Wo.to(bias.dtype) @ bc.to(bias.dtype)
        else:
            part.copy_(Wt)
            bias = bias + bt
    return weight, bias.to(bo.dtype)


def _merged_backward(
    at: Layout, p: dict[str, Tensor], s: Stream, dmerged: Tensor, dbias: Tensor, grads: dict[str, Tensor]
) -> None:
    """To the released parameters; to_out_context serves both streams, the second adds."""
    (Wo, _), (Wc, bc) = _linear(p, s.out), _linear(p, CONTEXT)
    parts = dict(zip(at.branches, dmerged.split(Wo.shape[0], dim=1), strict=True))
    if "cross" not in parts:
        dWo = torch.zeros_like(Wo)
    else:
        part = parts["cross"].to(Wo.dtype)
        dWo = torch.outer(dbias, bc.to(dbias.dtype)) + part @ Wc.T
        for name, value in ((f"{CONTEXT}.weight", Wo.T @ part), (f"{CONTEXT}.bias", Wo.T.to(dbias.dtype) @ dbias)):
            grads[name] = grads[name] + value if name in grads else value
    if "spatial" in parts:
        dWo = torch.add(dWo, parts["spatial"], alpha=SPATIAL_WEIGHT)
    if "temporal" in parts:
        grads[f"{s.out_temporal}.weight"], grads[f"{s.out_temporal}.bias"] = parts["temporal"], dbias
    grads[f"{s.out}.weight"], grads[f"{s.out}.bias"] = dWo, dbias


def _over(x: Operand) -> Tensor:
    """Room for a gradient of x that may take the place of x: in fp8 its bytes do not suffice."""
    return x if isinstance(x, Tensor) else x.q.new_empty(x.q.shape, dtype=x.dtype)


def _gelu(steps: Steps, p: dict[str, Tensor], s: Stream, pre_BLK: Tensor) -> Operand:
    return steps.gelu(pre_BLK.flatten(0, 1), p[f"{s.first}.bias"]).view(pre_BLK.shape)


def _linear(p: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return p[f"{name}.weight"], p[f"{name}.bias"]


def _rows(*tensors: Tensor) -> Tensors:
    """[B, T, S or N, D] as [B, L, D]: a view, but of text that is expanded over the frames and of strange strides."""
    return tuple(readable(x.flatten(1, 2)) for x in tensors)
