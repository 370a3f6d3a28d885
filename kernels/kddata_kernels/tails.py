"""The distillation term of a row from its few scalars: KL and its gradient with respect to z = x / T, for every tail.

Formulas are those of the table in kernels/README.md. "off" is all that is not kept: the dense classes (maximum m_d,
sum s_d of exp((x - ref_d) / T)) and labels that are not kept (u1, u2; -inf where there is none). Off has a reference of
its own, so that its log mass and the softmax within it stay exact where the mass itself underflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kddata_kernels.dense import finite

BUCKET, RENORM, UNIFORM, SUPPORT = 0, 1, 2, 3
TAILS = {"bucket": BUCKET, "renorm": RENORM, "uniform": UNIFORM, "support": SUPPORT, "sampled": RENORM}

_BUCKET = tl.constexpr(BUCKET)
_UNIFORM = tl.constexpr(UNIFORM)
_SUPPORT = tl.constexpr(SUPPORT)


@triton.jit
def one_minus_exp(x):  # type: ignore[no-untyped-def]
    """1 - exp(x) for x <= 0 with all of its digits: a series where x is small (libdevice is not in the interpreter)."""
    series = 1.0 + x / 8 * (1.0 + x / 9)
    series = 1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7 * series))
    series = 1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * series))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def off_mass(m_d, s_d, u1, u2, inv_t):  # type: ignore[no-untyped-def]
    """(m_off, s_off, factor from the dense reference to m_off, exp of u1 and of u2 around m_off)."""
    m_off = tl.maximum(m_d, tl.maximum(u1, u2))
    ref = finite(m_off)
    down = tl.exp((m_d - ref) * inv_t)
    e_u1 = tl.exp((u1 - ref) * inv_t)
    e_u2 = tl.exp((u2 - ref) * inv_t)
    return m_off, s_d * down + e_u1 + e_u2, down, e_u1, e_u2


@triton.jit
def off_share(x_S, m_off, s_off, inv_t):  # type: ignore[no-untyped-def]
    """The student's mass outside the kept classes."""
    ref = finite(tl.maximum(tl.max(x_S, 1), m_off))
    off = s_off * tl.exp((m_off - ref) * inv_t)
    return off / (off + tl.sum(tl.exp((x_S - ref[:, None]) * inv_t), 1))


@triton.jit
def kd_terms(  # type: ignore[no-untyped-def]
    x_S, log_p, log_tail, m_off, s_off, e_u1, e_u2, sum_off, n_off, inv_t, TAIL: tl.constexpr, HAS_TAIL: tl.constexpr
):
    """(KL, gradient at the kept classes, at u1, at u2, factor of the off softmax numerators, constant off gradient).

    `sum_off` is the sum of x - max over all off classes, for the uniform tail.
    """
    m_S = tl.max(x_S, 1)
    if TAIL == _SUPPORT:  # the student's mass is that of the kept classes alone
        ref = finite(m_S)
        from_off = tl.zeros_like(s_off)
    else:
        ref = finite(tl.maximum(m_S, m_off))
        from_off = tl.exp((m_off - ref) * inv_t)
    e_S = tl.exp((x_S - ref[:, None]) * inv_t)
    s = tl.sum(e_S, 1) + s_off * from_off
    log_s = tl.log(s)
    log_q = (x_S - ref[:, None]) * inv_t - log_s[:, None]

    ref_p = finite(tl.max(log_p, 1))
    p = tl.exp(log_p - ref_p[:, None])
    s_p = tl.sum(p, 1)
    log_p = log_p - (ref_p + tl.log(s_p))[:, None]
    p = tl.where(p == 0.0, 0.0, p / s_p[:, None])
    p_t = tl.zeros_like(s)
    if HAS_TAIL:
        log_tail = tl.minimum(log_tail, 0.0)  # rounding may lift it
        p_t = tl.exp(log_tail)
        p_kept = one_minus_exp(log_tail)
        p = p * p_kept[:, None]
        log_p = log_p + tl.log(p_kept)[:, None]

    kl = tl.sum(tl.where(p == 0.0, 0.0, p * (log_p - log_q)), 1)
    coef = from_off / s
    spread = tl.zeros_like(s)
    if HAS_TAIL and TAIL == _BUCKET:
        log_q_t = (m_off - ref) * inv_t + tl.log(s_off) - log_s
        kl += tl.where(p_t == 0.0, 0.0, p_t * (log_tail - log_q_t))
        q_t = s_off * from_off / s
        gap = tl.where((q_t > 0.5) & (p_t > 0.5), tl.sum(p - e_S / s[:, None], 1), q_t - p_t)  # of what is small
        coef = tl.where(s_off == 0.0, 0.0, gap / s_off)
    if HAS_TAIL and TAIL == _UNIFORM:
        spread = p_t / n_off
        log_q_sum = sum_off * inv_t - n_off * log_s
        kl += tl.where(p_t == 0.0, 0.0, p_t * (log_tail - tl.log(n_off)) - spread * log_q_sum)
    # A class that both hold probable takes minus the sum of the rest: near 1, q - p keeps no digits when it is small.
    q = e_S / s[:, None]
    sure = (q > 0.5) & (p > 0.5)
    rest = tl.sum(tl.where(sure, 0.0, q - p), 1) + coef * s_off - spread * n_off
    g_S = tl.where(sure, -rest[:, None], q - p)
    return kl, g_S, coef * e_u1 - spread, coef * e_u2 - spread, coef, spread
