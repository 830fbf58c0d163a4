"""Randomized SVD: the r largest singular triplets of a matrix, from a few products with it.

An exact SVD of a 4096 x 4096 matrix takes about a second on a GPU, and LLaMA-2-7B has 224 of that
size or more. PiSSA needs only the top r ~ 16 ... 256 triplets, and Halko, Martinsson and Tropp
(SIAM Review 2011, arXiv 0909.4061) get those from matrix products alone:

    1. range finder (their Algorithm 4.1): W times a Gaussian matrix of l = r + p columns lands,
       with high probability, close to the span of the l leading left singular vectors;
    2. power iteration (Algorithm 4.4): every product with W W^T multiplies the i-th direction
       by s_i^2, so the leading ones stand out. The columns would all collapse onto the first one,
       hence they are made orthonormal again after each such product;
    3. small exact factorisation (Algorithm 5.1): project W on that basis, decompose the l rows.

A shift lets fewer iterations do (dashSVD, arXiv 2404.09276): W W^T - a I multiplies the i-th
direction by s_i^2 - a. With a = s_l^2 / 2, the largest that makes none of the unwanted ones, from
-a to s_l^2 - a, stand out more, the ratio of a wanted one to them is squared or nearly so.

    notation   code         Halko et al.   what it is
               W            A              the matrix, (m, n)
               rank         k              triplets returned, r
               oversample   p              extra columns, so that the last triplets are good too
               niter        q              power iterations, each a product with W and one with W^T
               P            Q^T            (l, m), orthonormal rows: in memory, and for products
                                           with W, a row is one piece

How it differs from `torch.svd_lowrank`: it oversamples (there, q=r makes the last triplets poor),
it shifts, it orthonormalises half as often and by Cholesky (products and one small factorisation,
which GPUs like) instead of Householder QR, tensor cores may do all but the last products, signs are
canonical, and the random numbers come from a generator of its own.

The defaults were chosen by measurement (bench/NOTES.md).
"""
from contextlib import contextmanager

import torch


@contextmanager
def full_float32():
    """Float32 products in float32, even where a program allows TF32, which keeps 11 of 24 bits, or
    autocast."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [b.fp32_precision for b in backends]
    try:
        for b in backends:
            b.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for b, precision in zip(backends, before):
            b.fp32_precision = precision


def randomized_svd(W, rank, *, oversample=32, niter=5, generator=None):
    """Leading `rank` singular triplets of W.

    W: (m, n) or (b, m, n), any floating dtype; computed in float32 (float64 stays float64).
    oversample: extra columns of the random matrix; niter: power iterations, None for an exact SVD,
    which is also what runs when rank + oversample reaches min(m, n).
    generator: source of the random numbers; the default starts from seed 0 at every call.
    Returns U (..., m, r) and Vh (..., r, n), orthonormal, and S (..., r), descending. In every
    column of U the entry of largest magnitude is positive.
    Raises ValueError for a rank outside 1 ... min(m, n), NaN or Inf in W, or a W of integers.
    """
    group = list(W) if W.ndim == 3 else [W]
    U, S, Vh = grouped_svd(group, rank, oversample=oversample, niter=niter, generator=generator)
    return (U, S, Vh) if W.ndim == 3 else (U[0], S[0], Vh[0])


@torch.no_grad()
@full_float32()
def grouped_svd(Ws, rank, *, oversample=32, niter=5, generator=None):
    """`randomized_svd` of several matrices of one shape and dtype, a list of (m, n), together.

    One by one, a GPU mostly waits for small factorisations. So the products go one by one into one
    buffer, without a copy of the W (but of 16 bits, unless those are bfloat16 on a GPU), and
    everything else runs on the batch. One random matrix serves all. What a matrix gives depends on
    the others within rounding. Returns U (b, m, r), S (b, r), Vh (b, r, n).
    """
    if len({(W.shape, W.dtype) for W in Ws}) != 1:
        raise ValueError("a group is at least one matrix, and all have one shape and dtype")
    for W in Ws:
        check(W, rank, oversample, niter)
    (m, n), dtype = Ws[0].shape, wide(Ws[0][:0]).dtype
    if niter is None or rank + oversample >= min(m, n):
        U, S, Vh = torch.linalg.svd(torch.stack([wide(W) for W in Ws]), full_matrices=False)
        return fix_signs(U[..., :rank], S[..., :rank], Vh[..., :rank, :])

    generator = generator or torch.Generator(Ws[0].device).manual_seed(0)
    omega = torch.randn(rank + oversample, n, generator=generator, device=generator.device,
                        dtype=dtype).to(Ws[0].device)                             # (l, n)
    # once, not at every product; a bfloat16 W on a GPU stays as it is
    near = [W if tensor_cores(W) else W.to(dtype) for W in Ws]
    near_t = [W.mT for W in near]
    # Alg. 4.4, with P = Q^T: P = orth(Omega W^T), then niter times P <- orth(P W W^T - a P)
    Y = products([omega] * len(Ws), near_t, rough=True)                           # (b, l, m)
    size = Y.abs().amax((1, 2), keepdim=True).clamp(min=1e-38)       # or W W^T overflows for 1e20
    P, _ = orthonormalise(Y)
    shift = P.new_zeros(len(Ws), 1, 1)
    for _ in range(niter):
        Y = products(products(P, near, rough=True).div_(size), near_t, rough=True)
        P, least = orthonormalise(Y.sub_(shift * P))
        # `least` is about s_l^2 - a, which makes a rise towards s_l^2 / 2
        shift = torch.maximum(shift, (shift + least[:, None, None]) / 2)
    # Alg. 5.1: P W = Z = X S V^T, hence W ~ P^T Z = (P^T X) S V^T
    X, S, Vh = small_svd(products(P, near), rank)
    return fix_signs(P.mT @ X, S, Vh)


def tensor_cores(W):
    """Whether products with W can be bfloat16 ones with sums in float32."""
    return W.is_cuda and W.dtype == torch.bfloat16


def products(Ps, Ws, rough=False):
    """P W for each P (l, m) and W (m, n), into one buffer (b, l, n) of the dtype of the P.

    A bfloat16 W on a GPU needs no rounding for tensor cores, P does. rough, in the power
    iterations: once, which turns the basis a little, and the residual feels that in second order
    only. Else three products make a precise one: three bfloat16 hold the 24 bits of a float32.
    (Rounding W as well, or the sums, as CPUs do, costs the small singular values beside large
    ones: bench/NOTES.md.)
    """
    out = Ps[0].new_empty(len(Ws), Ps[0].shape[0], Ws[0].shape[1])
    for P, W, PW in zip(Ps, Ws, out):
        if not tensor_cores(W):
            torch.mm(P, W, out=PW)
            continue
        torch.mm(P.bfloat16(), W, out_dtype=torch.float32, out=PW)
        for _ in range(0 if rough else 2):
            P = P - P.bfloat16()                                      # what the last part left over
            PW += torch.mm(P.bfloat16(), W, out_dtype=torch.float32)
    return out


def wide(W):
    """W in the precision of decompositions: float32, or float64 if it has that."""
    return W if W.dtype == torch.float64 else W.float()


def check(W, rank, oversample, niter):
    """Raise ValueError for what cannot be decomposed."""
    if W.ndim != 2 or oversample < 0 or (niter or 0) < 0:
        raise ValueError(f"SVD of shape {tuple(W.shape)}, oversample {oversample}, niter {niter}: "
                         "it takes (m, n) or (b, m, n), and no negative numbers")
    if not W.is_floating_point():
        raise ValueError(f"SVD needs a floating-point matrix, not {W.dtype}")
    m, n = W.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} is not between 1 and {min(m, n)}, for a {m} x {n} matrix")
    if not finite(W):
        raise ValueError("the matrix holds NaN or Inf")


def finite(W):
    """Whether W holds neither NaN nor Inf. If it does, its sum is one, too, and a sum takes a tenth
    of the time; the sum of finite numbers may overflow, so then all of them are asked."""
    return bool(W.sum().isfinite()) or bool(W.isfinite().all())


def orthonormalise(Y):
    """Orthonormal basis of the rows of Y, (..., l, m) with m >= l, by Cholesky QR; smallest pivot.

    Y Y^T = L L^T makes L^-1 Y orthonormal. The Gram matrix squares the condition number, which
    float64 has room for: with Y in float32 the result is orthonormal to float32 rounding. Where the
    rows are (nearly) dependent, as for a W of low rank, Householder QR takes over.
    """
    Y64 = Y.double()
    L, info = torch.linalg.cholesky_ex(Y64 @ Y64.mT)
    pivots = L.diagonal(dim1=-2, dim2=-1)
    if bool(((info > 0) | (pivots.amin(-1) <= 1e-5 * pivots.amax(-1))).any()):    # one wait a batch
        Q, R = torch.linalg.qr(Y.mT)
        return Q.mT.contiguous(), R.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    return (inverse @ Y64).to(Y.dtype), pivots.amin(-1).to(Y.dtype)


def small_svd(Z, rank):
    """X, S, V^T with Z ~ X diag(S) V^T, the `rank` largest, of Z (..., l, n), l << n.

    Z Z^T = X S^2 X^T, an l x l eigenproblem, gives X and S, and V^T = S^-1 X^T Z. In float64, for
    the same reason as above.
    """
    Z64 = Z.double()
    S2, X = torch.linalg.eigh(Z64 @ Z64.mT)                                       # ascending
    S, X = S2.clamp(min=0).sqrt().flip(-1)[..., :rank], X.flip(-1)[..., :rank]
    if bool((S[..., -1] <= 1e-5 * S[..., 0]).any()):      # dividing by such an S would be noise
        X, S, Vh = torch.linalg.svd(Z, full_matrices=False)
        return X[..., :rank], S[..., :rank], Vh[..., :rank, :]
    Vh = (X / S[..., None, :]).mT @ Z64
    return X.to(Z.dtype), S.to(Z.dtype), Vh.to(Z.dtype)


def fix_signs(U, S, Vh):
    """Make the largest entry of every u_i positive: an SVD leaves the sign of (u_i, v_i) open."""
    low, high = U.amin(-2, keepdim=True), U.amax(-2, keepdim=True)                # (..., 1, r)
    sign = torch.where(-low > high, -1.0, 1.0).to(U.dtype)
    return U * sign, S, Vh * sign.mT
