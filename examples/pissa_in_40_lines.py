"""PiSSA against LoRA on a toy, in 40 lines that need nothing except torch.

    python examples/pissa_in_40_lines.py          # some seconds on a CPU

A small network is pretrained: it imitates another one, its teacher. Then it is fine-tuned, with
LoRA and with PiSSA, on two new tasks: to answer the opposite of the teacher, and to answer as
before while all inputs are shifted. Both methods train the same number of parameters, A (in, r)
and B (r, out), beside a frozen matrix. They differ only in where they start:

    LoRA     A = noise            B = 0                 frozen = W
    PiSSA    A = U_r S_r^1/2      B = S_r^1/2 V_r^T     frozen = W - A B

Both compute x W at step 0. LoRA's A has a gradient of exactly 0 there, because B is 0.

Each number is the error that is left after 50 steps. A row is a method, a column is a learning
rate. Read a column first: at the smallest rate PiSSA is ahead in both tasks. Then compare the best
of each row, which is the fair comparison. PiSSA wins the first task and loses the second one. It is
the better start for many tasks, and no free lunch.
"""
import torch
from torch.nn.functional import mse_loss

rank, steps, rates = 8, 50, (1e-3, 3e-3, 1e-2, 3e-2)
g = torch.Generator().manual_seed(0)


def network():
    """[(frozen, A, B)] of random layers y = x W, W (in, out). Here A is W itself."""
    shapes = (32, 128), (128, 128), (128, 8)
    return [(torch.zeros(i, o), 1.4 * i**-0.5 * torch.randn(i, o, generator=g), torch.eye(o))
            for i, o in shapes]


def forward(layers, x):
    """Outputs (n, 8) of inputs x (n, 32). In every layer, x W is x frozen + (x A) B."""
    for frozen, A, B in layers[:-1]:
        x = (x @ frozen + (x @ A) @ B).tanh()
    return x @ layers[-1][0] + (x @ layers[-1][1]) @ layers[-1][2]


def lora(W):
    """frozen, A, B: A is noise and B is 0, so A B is 0."""
    A = W.shape[0]**-0.5 * torch.randn(W.shape[0], rank, generator=g)
    return W, A, torch.zeros(rank, W.shape[1])


def pissa(W):
    """frozen, A, B: A B is the best approximation of W by rank r. The rest is frozen."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)      # W = U diag(S) Vh
    A, B = U[:, :rank] * S[:rank].sqrt(), S[:rank, None].sqrt() * Vh[:rank]
    return W - A @ B, A, B


def train(layers, batches, lr, trained):
    """One step of Adam for every batch."""
    optimizer = torch.optim.Adam([M.requires_grad_() for M in trained], lr)
    for x, y in batches:
        optimizer.zero_grad()
        mse_loss(forward(layers, x), y).backward()
        optimizer.step()


def batch(n, sign=1, shift=0):
    """Inputs (n, 32) and the answers (n, 8) that should be learnt."""
    x = torch.randn(n, 32, generator=g) * 2 / torch.arange(1, 33).sqrt()
    return x + shift, sign * forward(teacher, x)


teacher, student = network(), network()
train(student, [batch(128) for _ in range(1500)], 3e-3, [A for _, A, _ in student])
for task, change in ("opposite answers", {"sign": -1}), ("shifted inputs", {"shift": 1}):
    batches, (x, y) = [batch(64, **change) for _ in range(steps)], batch(2000, **change)
    print(f"{task:16}", *(f"  lr {lr:<6g}" for lr in rates), "   best")
    for init in lora, pissa:
        errors = []
        for lr in rates:
            layers = [init(W.detach()) for _, W, _ in student]
            train(layers, batches, lr, [M for _, A, B in layers for M in (A, B)])
            errors.append(mse_loss(forward(layers, x), y).item())
        print(f"  {init.__name__:14}", *(f"{e:11.4f}" for e in errors), f"{min(errors):9.4f}")
