"""MiLoRA: train the smallest singular components, freeze the others (arXiv 2406.09044).

PiSSA's equations with the other end of the spectrum. With W = U S V^T and d triplets,

    A = U_m S_m^1/2,    B = S_m^1/2 V_m^T,    W_res = W - A B,    y = x W_res + (x A) B

m are the last r of the d triplets, where PiSSA has the first r. What W does most stays frozen, and
the directions that it hardly uses are trained. A B is small, so it starts nearer to LoRA's A B = 0.

`--option offset=0.5` begins in the middle. Components between both ends are said to learn as well
and to forget less (arXiv 2602.03493). offset is the place of m among its d - r + 1 possible ones,
from 0, the last r triplets, to 1, the first r. Then this is PiSSA.

Cost: training as PiSSA. At the start, an exact SVD of every matrix, since the randomized SVD of
svd.py finds the largest triplets only: four minutes for Llama-2-7B on an H200.
"""
import pissa
from svd import randomized_svd

OPTIONS = {"offset": 0.0}


def init(weight, options):
    """weight (out, in), options -> W_res (out, in), A (in, r), B (r, out), (A, B). ValueError for
    an offset outside 0 ... 1."""
    if not 0 <= options.own["offset"] <= 1:
        raise ValueError(f"milora: offset is from 0 to 1, not {options.own['offset']}")
    U, S, Vh = randomized_svd(weight.T, min(weight.shape), niter=None)       # all, exactly
    first = round((1 - options.own["offset"]) * (len(S) - options.rank))
    m = slice(first, first + options.rank)
    A, B = U[:, m] * S[m].sqrt(), S[m].sqrt()[:, None] * Vh[m]
    return pissa.residual(weight, A, B), A, B, (A, B)
