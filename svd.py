# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""Randomized SVD: the r largest singular triplets of a matrix, hundreds of times faster than all.

For LLaMA-2-7B's 224 matrices at r = 128, an H200 takes 0.45 s here and four minutes for exact SVDs.
PiSSA needs only the top r = 16 ... 256 triplets, and Halko, Martinsson and Tropp (SIAM Review 2011,
arXiv 0909.4061) get those from a few matrix products:

    1. Range finder (their Algorithm 4.1). W times a Gaussian matrix with l = r + p columns lies,
       with high probability, close to the span of the l leading left singular vectors.
    2. Power iteration (Algorithm 4.4). Every product with W W^T multiplies the i-th direction by
       s_i^2, so the leading directions grow fastest. The columns would all collapse onto the first
       direction. So they are made orthonormal again after each such product.
    3. Small exact factorisation (Algorithm 5.1). Project W on that basis and decompose the l rows.

With a shift, fewer iterations are enough (dashSVD, arXiv 2404.09276). W W^T - a I multiplies the
i-th direction by s_i^2 - a. That is at least s_l^2 - a for the l wanted directions, and in size at
most that for all others, as long as a <= s_l^2 / 2. One iteration then nearly does the work of two.

    code         Halko et al.   what it is
    W            A              the matrix, (m, n)
    rank         k              number of triplets returned, r
    oversample   p              extra columns, so that the last triplets are good, too
    niter        q              power iterations, each a product with W and one with W^T
    P            Q^T            (l, m), the basis: rows are basis vectors, so each is contiguous

`torch.svd_lowrank` has no oversampling (q=r makes its last triplets poor), no shift, and twice as
many orthonormalisations, by Householder QR, which is slow on GPUs. Defaults: see bench/NOTES.md.
"""
from contextlib import contextmanager

import torch


@contextmanager
def full_float32():
    """Float32 products keep 24 bits inside, even if a program allows TF32 (11) or autocast."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [b.fp32_precision for b in backends]
    try:
        for b in backends:
            b.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for b, precision in zip(backends, before, strict=True):
            b.fp32_precision = precision


@torch.no_grad()
@full_float32()
def randomized_svd(W: torch.Tensor, rank: int, *, oversample=32, niter=5, generator=None):
    """U (m, r), S (r,), Vh (r, n): the leading `rank` singular triplets of W, S descending.

    W: (m, n), any floating dtype, computed in float32 (float64 stays float64), or a batch of them.
    niter: power iterations; None is an exact SVD, which also runs if rank + oversample reaches
    min(m, n). generator: default: seed 0 at every call. The largest entry of every column of U is
    positive. ValueError: a rank outside 1 ... min(m, n), NaN, Inf or integers in W.
    """
    if W.ndim == 3 or on_tensor_cores(W):
        U, S, Vh = grouped_svd(list(W) if W.ndim == 3 else [W], rank, oversample=oversample,
                               niter=niter, generator=generator)
        return (U, S, Vh) if W.ndim == 3 else (U[0], S[0], Vh[0])
    check(W, rank, oversample, niter)
    W, l = W.to(torch.promote_types(W.dtype, torch.float32)), rank + oversample
    if niter is None or l >= min(W.shape):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return fix_signs(U[:, :rank], S[:rank], Vh[:rank])
    omega = gaussian(l, W, generator)                                             # (l, n)
    Y = omega @ W.mT                                        # 1. P = orth(Omega W^T), (l, m)
    size = Y.abs().max().clamp(min=1e-38)                   #    W W^T / size cannot overflow
    P, _ = orthonormalise(Y)
    shift = 0 * size
    for _ in range(niter):                                  # 2. P <- orth(P (W W^T / size - a I))
        P, least = orthonormalise((P @ W / size) @ W.mT - shift * P)
        shift = torch.maximum(shift, (shift + least) / 2)   #    least ~ s_l^2 - a: a -> s_l^2 / 2
    X, S, Vh = small_svd(P @ W, rank)                       # 3. P W = X S V^T
    return fix_signs(P.mT @ X, S, Vh)                       #    W ~ P^T P W = (P^T X) S V^T


def gaussian(l, W, generator):
    """Omega (l, n), normally distributed, on the device of W (m, n)."""
    g = generator or torch.Generator(W.device).manual_seed(0)
    dtype = torch.promote_types(W.dtype, torch.float32)
    return torch.randn(l, W.shape[1], generator=g, device=g.device, dtype=dtype).to(W.device)


def orthonormalise(Y):
    """An orthonormal basis of the rows of Y (..., l, m), m >= l, and the smallest pivot (...).

    Cholesky QR: Y Y^T = L L^T makes L^-1 Y orthonormal. The Gram matrix squares the condition
    number, and float64 has room for that. For (nearly) dependent rows, Householder QR takes over.
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

    Z Z^T = X S^2 X^T, an l x l eigenproblem, gives X and S. Then V^T = S^-1 X^T Z. In float64, too.
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
    sign = torch.where(-U.amin(-2, keepdim=True) > U.amax(-2, keepdim=True), -1.0, 1.0).to(U.dtype)
    return U * sign, S, Vh * sign.mT


def check(W, rank, oversample, niter):
    """Raise ValueError if W, or what is asked of it, cannot be decomposed."""
    if W.ndim != 2 or oversample < 0 or (niter or 0) < 0:
        raise ValueError(f"SVD of shape {tuple(W.shape)}, oversample {oversample}, niter {niter}: "
                         "it takes (m, n) or (b, m, n), and no negative numbers")
    if not W.is_floating_point():
        raise ValueError(f"SVD needs a floating-point matrix, not {W.dtype}")
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank {rank} is not between 1 and {min(W.shape)}, for a "
                         f"{W.shape[0]} x {W.shape[1]} matrix")
    if not finite(W):
        raise ValueError("the matrix holds NaN or Inf")


def finite(W):
    """True if W holds neither NaN nor Inf. Either makes the sum NaN or Inf, and a sum is ten times
    cheaper. But a sum of finite numbers can overflow. Only then is every entry checked."""
    return bool(W.sum().isfinite()) or bool(W.isfinite().all())


# ------------------------------------------------------- the same for many matrices of one shape

@torch.no_grad()
@full_float32()
def grouped_svd(Ws, rank, *, oversample=32, niter=5, generator=None):
    """`randomized_svd` of a list of matrices (m, n) of one shape and dtype: three times as fast.

    One by one, a GPU mostly waits for small factorisations. Here they run as a batch, and products
    run one by one into one buffer. Only float16 (and bfloat16 on a CPU) is copied, into float32.
    One random matrix serves all. The rest of the group changes a result only by rounding. Returns
    U (b, m, r), S (b, r), Vh (b, r, n). Raises as randomized_svd.
    """
    if len({(W.shape, W.dtype) for W in Ws}) != 1:
        raise ValueError("a group is at least one matrix, and all have one shape and dtype")
    for W in Ws:
        check(W, rank, oversample, niter)
    l, dtype = rank + oversample, torch.promote_types(Ws[0].dtype, torch.float32)
    if niter is None or l >= min(Ws[0].shape):
        U, S, Vh = torch.linalg.svd(torch.stack(Ws).to(dtype), full_matrices=False)
        return fix_signs(U[..., :rank], S[..., :rank], Vh[..., :rank, :])
    omega = gaussian(l, Ws[0], generator)
    Ws = [W if on_tensor_cores(W) else W.to(dtype) for W in Ws]
    Wts = [W.mT for W in Ws]
    Y = products([omega] * len(Ws), Wts, rough=True)                              # (b, l, m)
    size = Y.abs().amax((1, 2), keepdim=True).clamp(min=1e-38)
    P, _ = orthonormalise(Y)
    shift = 0 * size
    for _ in range(niter):
        Y = products(products(P, Ws, rough=True).div_(size), Wts, rough=True)
        P, least = orthonormalise(Y.sub_(shift * P))
        shift = torch.maximum(shift, (shift + least[:, None, None]) / 2)
    X, S, Vh = small_svd(products(P, Ws), rank)
    return fix_signs(P.mT @ X, S, Vh)


def on_tensor_cores(W):
    """True if products with W can be bfloat16 ones with sums in float32."""
    return W.is_cuda and W.dtype == torch.bfloat16


def products(Ps, Ws, rough=False):
    """P W for each P (l, m) and W (m, n), into one buffer (b, l, n) of the dtype of the P.

    Tensor cores multiply bfloat16 and add in float32. W is bfloat16 already, P must be rounded.
    rough=True, for the power iterations, rounds it once: an error of second order in the residual.
    Otherwise P is split into three bfloat16 parts, 3 x 8 bits, and three products are added."""
    out = Ps[0].new_empty(len(Ws), Ps[0].shape[0], Ws[0].shape[1])
    for P, W, PW in zip(Ps, Ws, out, strict=True):
        if not on_tensor_cores(W):
            torch.mm(P, W, out=PW)
            continue
        torch.mm(P.bfloat16(), W, out_dtype=torch.float32, out=PW)
        for _ in range(0 if rough else 2):
            P = P - P.bfloat16()                                 # what the last part left over
            PW += torch.mm(P.bfloat16(), W, out_dtype=torch.float32)
    return out
