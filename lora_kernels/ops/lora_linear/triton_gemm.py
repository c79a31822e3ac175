# mypy: ignore-errors
"""K-extended GEMM: the low-rank product joins the accumulator of the base product.

Math       forward   Y  = [X | s S] [W | B]^T + bias
           dgrad     dX = sum_g dY_g W_g + keep_g * (dS_g A_g)      (dS_g holds s and 1 / P(keep))
           Both are C[m, p] = bias[p] + sum_g (sum_q L_g[m, q] R_g[q, p]
                                               + keep_g[m, p] scale sum_r U_g[m, r] V_g[r, p])
Shapes     L_g [M, Q_g], R_g [Q_g, P], U_g [M, r_g], V_g [r_g, P], C [M, P] contiguous. Strides are
           named by operand and axis (rps: of the R_g along p): W [N, K] is R with (rp, rq) = (K, 1)
           in the forward and (1, K) in dgrad, so nothing is transposed in memory.
Grid       tiles of BM x BP in groups of GROUP_M tile rows, so that a wave of programs shares its
           panels in L2; one program per tile, or (PERSISTENT) one per multiprocessor that walks
           over the tiles. gemm_pointer: cp.async pipeline from plain pointers, any strides.
           gemm_descriptor: tensor descriptors (TMA on sm_90 and later), row-major operands.
Bytes      the frozen GEMM's plus, per tile, BM RP of U and BP RP of V: for r = 16 one k-block of 16
           (r / Q of the flops). Y and dX are written once and never read back.
Numerics   one fp32 accumulator for base and update, bias added in fp32, one rounding to C.
           LORA_LAST: U is scaled and rounded to the dtype of the product, the update is the last
           k-block; up to rank 16 its operands are fetched before the main loop (PREFETCH).
           Otherwise it comes first and is scaled, or masked, in fp32 before the main loop adds.
           Bitwise reproducible: the order of every sum is fixed.
Limits     rank in blocks of RB, so any rank; with dropout BP is 32 or a multiple of 128 and the
           update comes first, as a mask cannot be applied to one term of a finished sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.ops._triton_philox import keep_tile


@triton.jit
def _tile_index(tile, tiles_m, tiles_p, GROUP_M: tl.constexpr):
    per_group = GROUP_M * tiles_p
    first = (tile // per_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % per_group
    return first + inside % height, inside // height


@triton.jit
def _u_tile(u, m, r, M, rank, um, scale, SCALE: tl.constexpr, dtype: tl.constexpr):
    pointers = u + tl.where(m < M, m, 0).to(tl.int64)[:, None] * um + r[None, :]
    tile = tl.load(pointers, mask=(r < rank)[None, :], other=0.0)
    return (tile.to(tl.float32) * scale).to(dtype) if SCALE else tile


@triton.jit
def _v_tile(v, r, p, P, rank, vr, vp, dtype: tl.constexpr):
    pointers = v + r.to(tl.int64)[:, None] * vr + p.to(tl.int64)[None, :] * vp
    tile = tl.load(pointers, mask=(r < rank)[:, None] & (p < P)[None, :], other=0.0)
    return tile.to(tl.float32).to(dtype) if tile.dtype != dtype else tile


@triton.jit
def _update(
    acc, u, v, m, p, M, P, rank, um, vr, vp, scale,
    RB: tl.constexpr, RANK_BLOCKS: tl.constexpr, SCALE: tl.constexpr,
    dtype: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + U V over blocks of the rank."""
    if RANK_BLOCKS <= 2:
        for block in tl.static_range(RANK_BLOCKS):
            r = block * RB + tl.arange(0, RB)
            a = _u_tile(u, m, r, M, rank, um, scale, SCALE, dtype)
            b = _v_tile(v, r, p, P, rank, vr, vp, dtype)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        for block in tl.range(0, RANK_BLOCKS):
            r = block * RB + tl.arange(0, RB)
            a = _u_tile(u, m, r, M, rank, um, scale, SCALE, dtype)
            b = _v_tile(v, r, p, P, rank, vr, vp, dtype)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _start(
    us, vs, seed_ptr, m, p, p_first, M, P, ranks, ums, vrs, vps, scale, threshold,
    G: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, RB: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, DROPOUT: tl.constexpr, SCALE: tl.constexpr, dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The updates of all members, masked or scaled in fp32: what the main loop adds to."""
    acc = tl.zeros((BM, BP), tl.float32)
    for g in tl.static_range(G):
        if DROPOUT:
            update = _update(
                tl.zeros((BM, BP), tl.float32), us[g], vs[g], m, p, M, P, ranks[g], ums[g],
                vrs[g], vps[g], scale, RB, RANK_BLOCKS, False, dtype, PRECISION,
            )  # fmt: skip
            keep = keep_tile(tl.load(seed_ptr, volatile=True), m, p_first, g, threshold, BM, BP)
            acc += tl.where(keep, update, 0.0)
        else:
            acc = _update(
                acc, us[g], vs[g], m, p, M, P, ranks[g], ums[g], vrs[g], vps[g], scale,
                RB, RANK_BLOCKS, False, dtype, PRECISION,
            )  # fmt: skip
    return acc * scale if SCALE else acc


@triton.jit
def _finish(acc, bias, bias_stride, p, P, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        acc += tl.load(bias + p.to(tl.int64) * bias_stride, mask=p < P, other=0.0).to(tl.float32)[
            None, :
        ]
    return acc


@triton.jit
def _pointer_tile(
    tile, ls, rs, us, vs, bias, bias_stride, c, seed_ptr, M, P, tiles_m, tiles_p, qs, ranks,
    lms, lqs, rps, rqs, ums, vrs, vps, scale, threshold,
    G: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, RB: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr, EVEN_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, LORA_LAST: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile_m, tile_p = _tile_index(tile, tiles_m, tiles_p, GROUP_M)
    m = tile_m * BM + tl.arange(0, BM)
    p = tile_p * BP + tl.arange(0, BP)
    m_read = tl.where(m < M, m, 0).to(tl.int64)[:, None]
    p_read = p.to(tl.int64)[None, :]
    p_inside = (p < P)[None, :]
    q = tl.arange(0, BQ)
    dtype: tl.constexpr = ls[0].dtype.element_ty
    PREFETCH: tl.constexpr = RB == 16 and RANK_BLOCKS == 1 and dtype != tl.float32
    acc = tl.zeros((BM, BP), tl.float32)
    if not LORA_LAST:
        acc = _start(
            us, vs, seed_ptr, m, p, tile_p * BP, M, P, ranks, ums, vrs, vps, scale, threshold,
            G, BM, BP, RB, RANK_BLOCKS, DROPOUT, SCALE, dtype, PRECISION,
        )  # fmt: skip
    for g in tl.static_range(G):
        if LORA_LAST and PREFETCH:
            r = tl.arange(0, RB)
            u = _u_tile(us[g], m, r, M, ranks[g], ums[g], scale, SCALE, dtype)
            v = _v_tile(vs[g], r, p, P, ranks[g], vrs[g], vps[g], dtype)
        left = ls[g] + m_read * lms[g] + q.to(tl.int64)[None, :] * lqs[g]
        right = rs[g] + q.to(tl.int64)[:, None] * rqs[g] + p_read * rps[g]
        for first in tl.range(0, qs[g], BQ):
            if EVEN_Q:
                a = tl.load(left)
                b = tl.load(right, mask=p_inside, other=0.0)
            else:
                a = tl.load(left, mask=(first + q < qs[g])[None, :], other=0.0)
                b = tl.load(right, mask=(first + q < qs[g])[:, None] & p_inside, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            left += BQ * lqs[g]
            right += BQ * rqs[g]
        if LORA_LAST:
            if PREFETCH:
                acc = tl.dot(u, v, acc, input_precision=PRECISION)
            else:
                acc = _update(
                    acc, us[g], vs[g], m, p, M, P, ranks[g], ums[g], vrs[g], vps[g], scale,
                    RB, RANK_BLOCKS, SCALE, dtype, PRECISION,
                )  # fmt: skip
    acc = _finish(acc, bias, bias_stride, p, P, HAS_BIAS)
    out = c + m.to(tl.int64)[:, None] * P + p[None, :]
    tl.store(out, acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & p_inside)


@triton.jit(do_not_specialize=["M", "threshold", "scale"])
def gemm_pointer(
    ls, rs, us, vs, bias, bias_stride, c, seed_ptr, M, P, qs, ranks,
    lms, lqs, rps, rqs, ums, vrs, vps, scale, threshold, programs,
    G: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, RB: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr, EVEN_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, LORA_LAST: tl.constexpr,
    PERSISTENT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_p = tl.cdiv(M, BM), tl.cdiv(P, BP)
    program = tl.program_id(0)
    if PERSISTENT:
        for tile in tl.range(program, tiles_m * tiles_p, programs):
            _pointer_tile(
                tile, ls, rs, us, vs, bias, bias_stride, c, seed_ptr, M, P, tiles_m, tiles_p,
                qs, ranks, lms, lqs, rps, rqs, ums, vrs, vps, scale, threshold, G, BM, BP, BQ, RB,
                RANK_BLOCKS, GROUP_M, EVEN_Q, HAS_BIAS, DROPOUT, LORA_LAST, SCALE, PRECISION,
            )  # fmt: skip
    else:
        _pointer_tile(
            program, ls, rs, us, vs, bias, bias_stride, c, seed_ptr, M, P, tiles_m, tiles_p,
            qs, ranks, lms, lqs, rps, rqs, ums, vrs, vps, scale, threshold, G, BM, BP, BQ, RB,
            RANK_BLOCKS, GROUP_M, EVEN_Q, HAS_BIAS, DROPOUT, LORA_LAST, SCALE, PRECISION,
        )  # fmt: skip


@triton.jit
def _descriptor_tile(
    tile, ls, rs, us, vs, bias, bias_stride, c, seed_ptr, M, P, tiles_m, tiles_p, qs, ranks,
    ums, vrs, vps, scale, threshold,
    G: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, RB: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr, R_IS_PQ: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, LORA_LAST: tl.constexpr,
    STORE_PARTS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile_m, tile_p = _tile_index(tile, tiles_m, tiles_p, GROUP_M)
    m_first, p_first = tile_m * BM, tile_p * BP
    m = m_first + tl.arange(0, BM)
    p = p_first + tl.arange(0, BP)
    dtype: tl.constexpr = c.dtype
    PREFETCH: tl.constexpr = RB == 16 and RANK_BLOCKS == 1 and dtype != tl.float32
    acc = tl.zeros((BM, BP), tl.float32)
    if not LORA_LAST:
        acc = _start(
            us, vs, seed_ptr, m, p, p_first, M, P, ranks, ums, vrs, vps, scale, threshold,
            G, BM, BP, RB, RANK_BLOCKS, DROPOUT, SCALE, dtype, PRECISION,
        )  # fmt: skip
    for g in tl.static_range(G):
        if LORA_LAST and PREFETCH:
            r = tl.arange(0, RB)
            u = _u_tile(us[g], m, r, M, ranks[g], ums[g], scale, SCALE, dtype)
            v = _v_tile(vs[g], r, p, P, ranks[g], vrs[g], vps[g], dtype)
        left, right = ls[g], rs[g]
        for first in tl.range(0, qs[g], BQ):
            a = left.load([m_first, first])
            if R_IS_PQ:
                b = tl.trans(right.load([p_first, first]))
            else:
                b = right.load([first, p_first])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        if LORA_LAST:
            if PREFETCH:
                acc = tl.dot(u, v, acc, input_precision=PRECISION)
            else:
                acc = _update(
                    acc, us[g], vs[g], m, p, M, P, ranks[g], ums[g], vrs[g], vps[g], scale,
                    RB, RANK_BLOCKS, SCALE, dtype, PRECISION,
                )  # fmt: skip
    acc = _finish(acc, bias, bias_stride, p, P, HAS_BIAS)
    if STORE_PARTS == 2:
        halves = tl.permute(tl.reshape(acc, (BM, 2, BP // 2)), (0, 2, 1))
        low, high = tl.split(halves)
        c.store([m_first, p_first], low.to(dtype))
        c.store([m_first, p_first + BP // 2], high.to(dtype))
    else:
        c.store([m_first, p_first], acc.to(dtype))


@triton.jit(do_not_specialize=["M", "threshold", "scale"])
def gemm_descriptor(
    l0, r0, l1, r1, l2, r2, us, vs, bias, bias_stride, c, seed_ptr, M, P, qs, ranks, ums, vrs, vps,
    scale, threshold, programs,
    G: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, RB: tl.constexpr,
    RANK_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr, R_IS_PQ: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, LORA_LAST: tl.constexpr,
    PERSISTENT: tl.constexpr, FLATTEN: tl.constexpr, STORE_PARTS: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Triton 3.6 cannot launch with descriptors in a tuple: they are arguments, None past G.
    if G == 1:
        ls, rs = (l0,), (r0,)
    elif G == 2:
        ls, rs = (l0, l1), (r0, r1)
    else:
        tl.static_assert(G == 3)
        ls, rs = (l0, l1, l2), (r0, r1, r2)
    tiles_m, tiles_p = tl.cdiv(M, BM), tl.cdiv(P, BP)
    program = tl.program_id(0)
    if PERSISTENT:
        for tile in tl.range(program, tiles_m * tiles_p, programs, flatten=FLATTEN):
            _descriptor_tile(
                tile, ls, rs, us, vs, bias, bias_stride, c, seed_ptr, M, P, tiles_m, tiles_p,
                qs, ranks, ums, vrs, vps, scale, threshold, G, BM, BP, BQ, RB, RANK_BLOCKS, GROUP_M,
                R_IS_PQ, HAS_BIAS, DROPOUT, LORA_LAST, STORE_PARTS, SCALE, PRECISION,
            )  # fmt: skip
    else:
        _descriptor_tile(
            program, ls, rs, us, vs, bias, bias_stride, c, seed_ptr, M, P, tiles_m, tiles_p,
            qs, ranks, ums, vrs, vps, scale, threshold, G, BM, BP, BQ, RB, RANK_BLOCKS, GROUP_M,
            R_IS_PQ, HAS_BIAS, DROPOUT, LORA_LAST, STORE_PARTS, SCALE, PRECISION,
        )  # fmt: skip
