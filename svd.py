# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""Randomized SVD: the r largest singular triplets, hundreds of times faster than a full SVD.

For LLaMA-2-7B's 224 matrices at r = 128, an H200 takes 0.3 s here and four minutes for exact SVDs.
PiSSA needs only the top r = 16 ... 256 triplets, and Halko, Martinsson and Tropp (SIAM Review 2011,
arXiv 0909.4061) get those from a few matrix products:

    1. Range finder (their Algorithm 4.1). Omega is Gaussian, with l = r + p columns, p more than
       wanted. The columns of W Omega nearly span the r leading left singular vectors.
    2. Power iteration (Algorithm 4.4). Every product with W W^T multiplies the i-th direction by
       s_i^2, s_i the i-th singular value. So the leading directions grow fastest, and all columns
       would turn to the first one. After each such product they are made orthonormal again.
    3. Small exact factorisation (Algorithm 5.1). Project W on that basis: l rows. Decompose those.

With a shift a, fewer iterations are enough (dashSVD, arXiv 2404.09276). W W^T - a I multiplies the
i-th direction by s_i^2 - a. If a <= s_l^2 / 2, |s_i^2 - a| <= s_l^2 - a for i > l: the first l stay
the largest. If a = s_l^2 / 2, one iteration multiplies the i-th direction, relative to the l-th, by
(s_i^2 - a) / (s_l^2 - a) = 2 x - 1 instead of x = s_i^2 / s_l^2, near x = 1 about x^2: two in one.
An a that is a little too large costs only some of the p extra columns.

    code         Halko et al.   what it is
    W            A              the matrix, (m, n)
    rank         k              number of triplets returned, r
    oversample   p              extra columns, so that the last triplets are good, too
    niter        q              power iterations, each a product with W and one with W^T
    P            Q^T            (l, m), the basis: rows are basis vectors, so each is contiguous

`torch.svd_lowrank(W, r)` has no extra columns, so its last triplets are poor. It has no shift, and
twice as many orthonormalisations, by Householder QR, slow on GPUs. Defaults: see bench/NOTES.md.
"""
from contextlib import contextmanager

import torch


@contextmanager
def full_float32():
    """Float32 products keep 24 significant bits, even if TF32 (11 bits) or autocast is allowed."""
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

    W: (m, n), any floating dtype; the result is float32, or float64 of a float64. A batch (b, m, n)
    gives a batch. niter: power iterations; None, or rank + oversample >= min(m, n), is an exact
    SVD. generator: default: seed 0 at every call. The largest entry by magnitude of each u_i is
    positive. ValueError: a rank outside 1 ... min(m, n), NaN, Inf or integers in W.
    """
    if W.ndim == 3 or multiplies_in_bfloat16(W):      # the steps below, with other products
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
    scale = Y.abs().max().clamp(min=1e-38)                  #    from here on, s_i^2 and a are in
    P, _ = orthonormalise(Y)                                #    units of it: nothing can overflow
    a = torch.zeros_like(scale)
    for _ in range(niter):                                  # 2. P <- orth(P (W W^T / scale - a I))
        P, least = orthonormalise((P @ W / scale) @ W.mT - a * P)
        a = torch.maximum(a, (a + least) / 2)               #    least ~ s_l^2 - a: a -> s_l^2 / 2
    X, S, Vh = small_svd(P @ W, rank)                       # 3. P W = X S V^T
    return fix_signs(P.mT @ X, S, Vh)                       #    W ~ P^T P W = (P^T X) S V^T


def gaussian(l, W, generator):
    """Omega (l, n), normally distributed, on the device of W (m, n)."""
    g = generator or torch.Generator(W.device).manual_seed(0)
    dtype = torch.promote_types(W.dtype, torch.float32)
    return torch.randn(l, W.shape[1], generator=g, device=g.device, dtype=dtype).to(W.device)


def orthonormalise(Y):
    """An orthonormal basis of the rows of Y (..., l, m), m >= l, and the least |L_ii| (...).

    Cholesky QR: Y Y^T = L L^T makes L^-1 Y orthonormal. Householder QR takes over for (nearly)
    dependent rows. For Y = P (W W^T - a I), the least |L_ii| is about s_l^2 - a."""
    Y64 = Y.double()
    L, info = torch.linalg.cholesky_ex(Y64 @ Y64.mT)
    pivots = L.diagonal(dim1=-2, dim2=-1)       # 1e-5 in L is 1e-10 in Y Y^T, and float64 has 1e-16
    if bool(((info > 0) | (pivots.amin(-1) <= 1e-5 * pivots.amax(-1))).any()):   # waits for the GPU
        Q, R = torch.linalg.qr(Y.mT)
        return Q.mT.contiguous(), R.diagonal(dim1=-2, dim2=-1).abs().amin(-1)
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    return (inverse @ Y64).to(Y.dtype), pivots.amin(-1).to(Y.dtype)


def small_svd(Z, rank):
    """X, S, V^T: the `rank` largest singular triplets of Z (..., l, n), l << n.

    Z Z^T = X S^2 X^T, an l x l eigenproblem, gives X and S. Then V^T = S^-1 X^T Z. In float64."""
    Z64 = Z.double()
    if Z.is_cuda and Z.ndim == 3:      # the same of a whole batch at once; eigh goes one by one
        V, S, Xh = torch.linalg.svd(Z64.mT, full_matrices=False, driver="gesvda")
        X, Vh = Xh.mT, V.mT
    else:
        S2, X = torch.linalg.eigh(Z64 @ Z64.mT)                                   # ascending
        S, X = S2.clamp(min=0).sqrt().flip(-1), X.flip(-1)
        Vh = (X[..., :rank] / S[..., None, :rank]).mT @ Z64
    if bool((S[..., rank - 1] <= 1e-5 * S[..., 0]).any()):  # dividing by such an S has made noise
        X, S, Vh = torch.linalg.svd(Z, full_matrices=False)
    return [M.to(Z.dtype) for M in (X[..., :rank], S[..., :rank], Vh[..., :rank, :])]


def fix_signs(U, S, Vh):
    """Make the entry of largest magnitude of every u_i positive: an SVD leaves its sign open."""
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
        raise ValueError(f"rank {rank} is not between 1 and {min(W.shape)}, of {tuple(W.shape)}")
    if not finite(W):
        raise ValueError("the matrix holds NaN or Inf")


def finite(W):
    """True if W holds neither NaN nor Inf: either makes the sum NaN or Inf, and a sum is ten times
    cheaper. A sum of finite numbers can overflow. Only then is every entry checked."""
    return bool(W.sum().isfinite()) or bool(W.isfinite().all())


# ------------------------------------------------------- the same for many matrices of one shape

@torch.no_grad()
@full_float32()
def grouped_svd(Ws, rank, *, oversample=32, niter=5, generator=None):
    """`randomized_svd` of a list of matrices (m, n) of one shape and dtype: three times as fast.

    One after another, a GPU mostly waits for small factorisations. Here those run as one batch. The
    large products run one by one: a batch would copy all W. (float16, and bfloat16 on a CPU, are
    copied.) All share one Omega. Returns U (b, m, r), S (b, r), Vh (b, r, n)."""
    if len({(W.shape, W.dtype) for W in Ws}) != 1:
        raise ValueError("a group is at least one matrix, and all have one shape and dtype")
    for W in Ws:
        check(W, rank, oversample, niter)
    l, dtype = rank + oversample, torch.promote_types(Ws[0].dtype, torch.float32)
    if niter is None or l >= min(Ws[0].shape):
        U, S, Vh = torch.linalg.svd(torch.stack(Ws).to(dtype), full_matrices=False)
        return fix_signs(U[..., :rank], S[..., :rank], Vh[..., :rank, :])
    omega = gaussian(l, Ws[0], generator)
    Ws = [W if multiplies_in_bfloat16(W) else W.to(dtype) for W in Ws]
    Wts = [W.mT for W in Ws]
    Y = products([omega] * len(Ws), Wts, rough=True)                              # (b, l, m)
    scale = Y.abs().amax((1, 2), keepdim=True).clamp(min=1e-38)
    P, _ = orthonormalise(Y)
    a = torch.zeros_like(scale)
    for _ in range(niter):
        Y = products(products(P, Ws, rough=True).div_(scale), Wts, rough=True)
        P, least = orthonormalise(Y.sub_(a * P))
        a = torch.maximum(a, (a + least[:, None, None]) / 2)
    X, S, Vh = small_svd(products(P, Ws), rank)
    return fix_signs(P.mT @ X, S, Vh)


def multiplies_in_bfloat16(W):
    """True if products with W can be bfloat16 ones with sums in float32."""
    return W.is_cuda and W.dtype == torch.bfloat16


def products(Ps, Ws, rough=False):
    """P W for each P (l, m) and W (m, n), into one buffer (b, l, n) of the dtype of the P.

    Tensor cores multiply bfloat16 and add in float32. W is bfloat16 already, P must be rounded.
    rough=True, for the power iterations, only rounds it: a basis tilted a little is as good.
    Otherwise P is the sum of three bfloat16 parts, 3 x 8 bits."""
    out = Ps[0].new_empty(len(Ws), Ps[0].shape[0], Ws[0].shape[1])
    for P, W, PW in zip(Ps, Ws, out, strict=True):
        if not multiplies_in_bfloat16(W):
            torch.mm(P, W, out=PW)
            continue
        torch.mm(P.bfloat16(), W, out_dtype=torch.float32, out=PW)
        for _ in range(0 if rough else 2):
            P = P - P.bfloat16()                                 # what the last part left over
            PW += torch.mm(P.bfloat16(), W, out_dtype=torch.float32)
    return out
