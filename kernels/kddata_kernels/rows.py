"""Loss and gradient of rows of logits in one pass: the kernel and its launcher.

It works in this order. (1) Gather the logits of the fixed classes (kept ones and labels). (2) Pass over the other
classes: maximum and sums. (3) All of the row's scalars, in float32 and in the log domain. (4) Write the dense part of
the gradient, barrier, and overwrite the fixed classes with values that were worked out in float32 and rounded once.

Trade-off: the fixed classes are written twice, which is cheap, so that no element is read, changed and written again
in the dtype of the logits, which loses up to all of a small gradient.

Shapes: N rows, C classes, K kept; R rows of a program, KP = K padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kddata_kernels.dense import exps, finite, fixed_bits, load_tile
from kddata_kernels.hard import ce_terms, label_at
from kddata_kernels.tails import SUPPORT, UNIFORM, kd_terms, off_mass, off_share

_UNIFORM = tl.constexpr(UNIFORM)
_SUPPORT = tl.constexpr(SUPPORT)
_NO_CLASS = tl.constexpr(2**31 - 1)
_VARYING = [
    "logits_stride",
    "grad_stride",
    "reach",
    "ids_stride",
    "log_p_stride",
    "grad_out_stride",
    "N",
    "C",
    "K",
    "ignore_index",
]


@triton.jit
def better(x_a, id_a, x_b, id_b):  # type: ignore[no-untyped-def]
    """The larger of two logits and its class; the lower class where they are equal."""
    take_b = (x_b > x_a) | ((x_b == x_a) & (id_b < id_a))
    return tl.maximum(x_a, x_b), tl.where(take_b, id_b, id_a)


# N, C, K and strides vary from call to call and are no reason to compile again; ALIGN says what matters of them.
# KD and CE: 0 absent, 1 for the statistics alone, 2 in the loss. SUMX: the sum of logits is needed.
@triton.jit(do_not_specialize=_VARYING)
def kd_rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    logits_stride,  # in units of ALIGN elements, as is reach, C rounded up: so the compiler knows what is aligned
    grad_ptr,
    grad_stride,
    reach,
    ids_ptr,
    ids_stride,
    log_p_ptr,
    log_p_stride,
    log_tail_ptr,
    targets_ptr,
    targets_b_ptr,
    lam_ptr,
    weights_ptr,
    ce_scale_ptr,
    grad_out_ptr,
    grad_out_stride,
    loss_ptr,
    stats_ptr,
    top1_ptr,
    N,
    C,
    K,
    inv_t,
    kd_scale,
    ce_scale,
    smoothing,
    ignore_index,
    TAIL: tl.constexpr,
    KD: tl.constexpr,
    CE: tl.constexpr,
    SMOOTH: tl.constexpr,
    POWER: tl.constexpr,
    ALL_KEPT: tl.constexpr,
    SKIP_ONES: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ALIGN: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    LOOPED: tl.constexpr,
    KP: tl.constexpr,
):
    STATS: tl.constexpr = stats_ptr is not None
    PAIR: tl.constexpr = targets_b_ptr is not None
    HAS_TAIL: tl.constexpr = KD > 0 and log_tail_ptr is not None
    SUMX: tl.constexpr = (HAS_TAIL and TAIL == _UNIFORM) or SMOOTH
    DENSE_KD: tl.constexpr = KD > 0 and not ALL_KEPT and (TAIL != _SUPPORT or STATS)
    DENSE_CE: tl.constexpr = CE > 0 and not ALL_KEPT
    TWO_SUMS: tl.constexpr = DENSE_KD and DENSE_CE and POWER != 1

    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)  # int64: N times C passes 2^31
    live = row < N
    none = tl.full([R], float("-inf"), tl.float32)
    zero = tl.full([R], 0.0, tl.float32)
    false = row < 0
    weight = zero + 1.0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=live, other=0.0)
    kd_weight = weight * kd_scale
    ce_weight = weight * ce_scale
    if ce_scale_ptr is not None:
        ce_weight *= tl.load(ce_scale_ptr)
    grad_out = zero + 1.0
    if grad_out_ptr is not None:
        grad_out = tl.load(grad_out_ptr + row * grad_out_stride, mask=live, other=1.0)
        if SKIP_ONES:  # noqa: SIM102  # what the forward pass wrote is the gradient already
            if tl.min(tl.where(grad_out == 1.0, 1, 0), 0) == 1:
                return

    # (1) the fixed classes
    logits_row = logits_ptr + row * logits_stride * ALIGN
    width = reach * ALIGN
    ids_row = row * ids_stride
    j = tl.arange(0, KP)
    kept = live[:, None] & (j < K)[None, :]
    wide_ids = tl.load(ids_ptr + ids_row[:, None] + j[None, :], mask=kept, other=0).to(tl.int64)
    known = kept & (wide_ids >= 0) & (wide_ids < C)
    ids = wide_ids.to(tl.int32)
    x_S = tl.load(logits_row[:, None] + ids, mask=known, other=float("-inf")).to(tl.float32)
    x_S = tl.where(kept & (known == 0), float("nan"), x_S)  # an id that is no class makes its row NaN
    m_S = tl.max(x_S, 1)
    y1 = tl.full([R], -1, tl.int32)
    y2 = y1
    x1, x2, u1, u2 = none, none, none, none  # u: the logit of a label that is not kept
    a1, a2 = zero, zero
    new1, new2, same = false, false, false
    hit1 = kept & (ids < 0)
    hit2 = hit1
    if CE > 0:
        y1, x1, has1, hit1, new1 = label_at(targets_ptr, logits_row, row, live, ids, kept, ignore_index, C)
        a1 = tl.where(has1, 1.0, 0.0)
        if PAIR:
            y2, x2, has2, hit2, new2 = label_at(targets_b_ptr, logits_row, row, live, ids, kept, ignore_index, C)
            lam = tl.load(lam_ptr + row, mask=live, other=1.0)
            a1 = tl.where(has1, lam, 0.0)
            a2 = tl.where(has2, 1.0 - lam, 0.0)
            same = has1 & has2 & (y1 == y2)
            new2 = new2 & (same == 0)
            u2 = tl.where(new2, x2, none)
        u1 = tl.where(new1, x1, none)

    # (2) all other classes: maximum m_d, sums s_d at T and s1_d at 1 of exp(x - ref_d), sum sx_d of x - ref_d
    m_d, s_d, s1_d, sx_d, ref_d = none, zero, zero, zero, zero
    top_d = tl.full([R], _NO_CLASS, tl.int32)
    if DENSE_KD or DENSE_CE:
        if LOOPED:
            seen = zero
            for start in range(0, C, BLOCK):
                offs = start + tl.arange(0, BLOCK)
                raw = load_tile(logits_row, offs, live, width)
                free = (fixed_bits(ids_ptr, ids_row, live, K, y1, y2, start, R, BLOCK) == 0) & (offs < C)[None, :]
                x = tl.where(free, raw, float("-inf"))
                m_tile = tl.max(x, 1)
                if STATS:
                    top_tile = tl.min(tl.where(x == m_tile[:, None], offs[None, :], _NO_CLASS), 1)
                    top_d = tl.where(m_tile > m_d, top_tile, top_d)
                m_new = tl.maximum(m_d, m_tile)
                ref = finite(m_new)
                e, e1 = exps(x, ref[:, None], inv_t, DENSE_KD, DENSE_CE, POWER)
                old, old1 = exps(m_d, ref, inv_t, DENSE_KD, DENSE_CE, POWER)
                s_d = s_d * old + tl.sum(e, 1)
                if TWO_SUMS:
                    s1_d = s1_d * old1 + tl.sum(e1, 1)
                if SUMX:
                    sx_d += seen * (ref_d - ref) + tl.sum(tl.where(free, raw - ref[:, None], 0.0), 1)
                    seen += tl.sum(free.to(tl.float32), 1)
                m_d = m_new
                ref_d = ref
        else:
            offs = tl.arange(0, BLOCK)
            raw = load_tile(logits_row, offs, live, width)
            free = (fixed_bits(ids_ptr, ids_row, live, K, y1, y2, 0, R, BLOCK) == 0) & (offs < C)[None, :]
            x = tl.where(free, raw, float("-inf"))
            m_d = tl.max(x, 1)
            if STATS:
                top_d = tl.min(tl.where(x == m_d[:, None], offs[None, :], _NO_CLASS), 1)
            ref_d = finite(m_d)
            e, e1 = exps(x, ref_d[:, None], inv_t, DENSE_KD, DENSE_CE, POWER)
            s_d = tl.sum(e, 1)
            if TWO_SUMS:
                s1_d = tl.sum(e1, 1)
            if SUMX:
                sx_d = tl.sum(tl.where(free, raw - ref_d[:, None], 0.0), 1)
    if not TWO_SUMS:
        s1_d = s_d

    # (3) the row's scalars
    m_off, s_off, down, e_u1, e_u2 = off_mass(m_d, s_d, u1, u2, inv_t)
    ref = finite(tl.maximum(m_off, m_S))
    n_off = (C - K).to(tl.float32)
    sum_off = zero
    if SUMX:
        n_d = n_off - new1.to(tl.float32) - new2.to(tl.float32)
        sum_off = sx_d + n_d * (ref_d - ref) + tl.where(new1, u1 - ref, 0.0) + tl.where(new2, u2 - ref, 0.0)
    loss, grad_y1, grad_y2 = zero, zero, zero
    grad_S = tl.zeros([R, KP], tl.float32)
    c_e, c_1, c_0 = zero, zero, zero  # the dense gradient is c_e exp((x - ref_d) / T) + c_1 exp(x - ref_d) - c_0
    if KD > 0:
        log_p = tl.load(log_p_ptr + row[:, None] * log_p_stride + j[None, :], mask=kept, other=float("-inf"))
        log_tail = none
        if HAS_TAIL:
            log_tail = tl.load(log_tail_ptr + row, mask=live, other=0.0)
        kl, g_S, g_u1, g_u2, coef, spread = kd_terms(
            x_S, log_p.to(tl.float32), log_tail, m_off, s_off, e_u1, e_u2, sum_off, n_off, inv_t, TAIL, HAS_TAIL
        )
        if KD == 2:
            loss = kd_weight * kl
            factor = kd_weight * grad_out * inv_t  # d loss / dz times dz / dx
            grad_S = factor[:, None] * g_S
            grad_y1 = factor * g_u1
            grad_y2 = factor * g_u2
            c_e = factor * coef * down
            c_0 = factor * spread
        if STATS:
            tl.store(stats_ptr + row, kl, mask=live)
            tl.store(stats_ptr + 2 * N.to(tl.int64) + row, off_share(x_S, m_off, s_off, inv_t), mask=live)
    if CE > 0:
        sum_all = sum_off + tl.sum(tl.where(kept, x_S - ref[:, None], 0.0), 1)
        ce, g_S, g_u1, g_u2, coef, spread = ce_terms(
            x_S, s1_d, m_d, x1, x2, u1, u2, hit1, hit2, a1, a2, same, ref, sum_all, smoothing, C, SMOOTH, PAIR
        )
        if CE == 2:
            loss += ce_weight * ce
            factor = ce_weight * grad_out
            grad_S += factor[:, None] * g_S
            grad_y1 += factor * g_u1
            grad_y2 += factor * g_u2
            c_1 = factor * coef
            c_0 += factor * spread
        if STATS:
            tl.store(stats_ptr + N.to(tl.int64) + row, ce, mask=live)
    if loss_ptr is not None:
        tl.store(loss_ptr + row, loss, mask=live)
    if STATS:
        x_top, top = better(m_d, top_d, m_S, tl.min(tl.where(kept & (x_S == m_S[:, None]), ids, _NO_CLASS), 1))
        x_top, top = better(x_top, top, u1, tl.where(new1, y1, _NO_CLASS))
        x_top, top = better(x_top, top, u2, tl.where(new2, y2, _NO_CLASS))
        tl.store(top1_ptr + row, tl.where(top == _NO_CLASS, -1, top), mask=live)

    # (4) the gradient: dense, barrier, fixed classes
    if grad_ptr is not None:
        WRITE_KD: tl.constexpr = KD == 2 and TAIL != _SUPPORT
        dtype = grad_ptr.dtype.element_ty
        grad_row = grad_ptr + row * grad_stride * ALIGN
        if IN_PLACE:
            tl.debug_barrier()  # other warps may still be gathering
        if not ALL_KEPT:
            num_tiles = tl.cdiv(C, BLOCK) if LOOPED else 1
            for i in range(0, num_tiles):  # backwards: the end of the row is the likeliest to be still in the L2 cache
                offs = (num_tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
                if LOOPED and (WRITE_KD or CE == 2):
                    raw = load_tile(logits_row, offs, live, width)
                    e, e1 = exps(raw, ref_d[:, None], inv_t, DENSE_KD, DENSE_CE, POWER)
                    if IN_PLACE:
                        tl.debug_barrier()
                g = tl.zeros([R, BLOCK], tl.float32)
                if WRITE_KD:
                    g += c_e[:, None] * e
                if CE == 2:
                    g += c_1[:, None] * e1
                if SUMX:
                    g -= c_0[:, None]
                tl.store(grad_row[:, None] + offs[None, :], g.to(dtype), mask=live[:, None] & (offs < width)[None, :])
            tl.debug_barrier()
        tl.store(grad_row[:, None] + ids, grad_S.to(dtype), mask=known)
        tl.store(grad_row + y1, grad_y1.to(dtype), mask=new1 & (y1 >= 0))
        tl.store(grad_row + y2, grad_y2.to(dtype), mask=new2 & (y2 >= 0))
