"""The hard term of a row from its few scalars: cross entropy with smoothing and a mixed pair, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def label_at(targets_ptr, logits_row, row, live, ids, kept, ignore_index, C):  # type: ignore[no-untyped-def]
    """(class or -1, its logit or -inf, there is a label, its place among the kept classes, it is a class not kept)."""
    y = tl.load(targets_ptr + row, mask=live, other=ignore_index).to(tl.int64)
    has = y != ignore_index
    inside = has & (y >= 0) & (y < C)
    y = tl.where(inside, y, -1).to(tl.int32)
    x = tl.load(logits_row + y, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(has & (inside == 0), float("nan"), x)  # a label that is no class makes its row NaN
    hit = kept & inside[:, None] & (ids == y[:, None])
    return y, x, has, hit, has & (tl.max(hit.to(tl.int32), 1) == 0)


@triton.jit
def ce_terms(  # type: ignore[no-untyped-def]
    x_S,
    s1_d,
    m_d,
    x1,
    x2,
    u1,
    u2,
    hit1,
    hit2,
    a1,
    a2,
    same,
    ref,
    sum_all,
    smoothing,
    C,
    SMOOTH: tl.constexpr,
    PAIR: tl.constexpr,
):
    """(CE, gradient at the kept classes, at u1, at u2, factor of the dense exp(x - ref_d), constant of the gradient).

    a1 and a2 are the weights of the labels, 0 where there is none; `sum_all` is the sum of x - ref over all classes.
    At a label q - 1 is minus the mass of all other classes, summed: exact where the student is sure.
    """
    e_S = tl.exp(x_S - ref[:, None])
    down = tl.exp(m_d - ref)
    e_u1 = tl.exp(u1 - ref)
    e_u2 = tl.exp(u2 - ref)
    dense = s1_d * down
    s = dense + tl.sum(e_S, 1) + e_u1 + e_u2
    log_s = tl.log(s)
    a = a1 + a2
    hard = 1.0 - smoothing
    ce = tl.where(a1 == 0.0, 0.0, a1 * hard * ((ref - x1) + log_s))
    soft = tl.zeros_like(s)
    if SMOOTH:
        soft = a * smoothing / C
        ce += tl.where(a == 0.0, 0.0, a * smoothing * log_s - soft * sum_all)
    g_S = (a / s)[:, None] * e_S
    g_u2 = tl.zeros_like(s)
    if PAIR:
        ce += tl.where(a2 == 0.0, 0.0, a2 * hard * ((ref - x2) + log_s))
        others = dense + tl.sum(tl.where(hit2, 0.0, e_S), 1) + e_u1
        g_u2 = (a - hard * a2) - a * others / s
        g_S = tl.where(hit2, g_u2[:, None], g_S)
        a1 = tl.where(same, a, a1)
    others = dense + tl.sum(tl.where(hit1, 0.0, e_S), 1) + e_u2
    g_u1 = (a - hard * a1) - a * others / s
    g_S = tl.where(hit1, g_u1[:, None], g_S)
    return ce, g_S - soft[:, None], g_u1 - soft, g_u2 - soft, a * down / s, soft
