"""PiSSA in a training loop of your own, on a network that is not a LLaMA.

    python examples/your_loop.py                           # some seconds on a CPU

It takes three calls: `inject` before the optimizer is made, `save` after training, and `load` on
the original network. Everything else is an ordinary loop. Any nn.Module works, if its weights are
in nn.Linear layers: name those in `targets`.
"""
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))      # not needed beside copied files

import adapter  # noqa: E402
import pissa  # noqa: E402


class Regressor(nn.Module):
    """(batch, 16) -> (batch, 4): two blocks with a residual connection, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 64),
                                                   "down": nn.Linear(64, 16)}) for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        """The outputs (batch, 4) of x (batch, 16)."""
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.head(x)


def train(net, x, y, lr, steps):
    """Your own loop. The optimizer gets the parameters that require a gradient."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss = nn.functional.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main():
    """Pretrain, inject, fine-tune, save, load, merge. Returns the numbers that it prints."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    old_task, new_task = x[:, :4].sin(), x[:, :4].sin() + 0.5 * x[:, 4:8].tanh()
    net, copy = Regressor(), Regressor()
    train(net, x, old_task, lr=3e-3, steps=300)                   # or load what you have
    copy.load_state_dict(net.state_dict())                        # the base model, for later
    before = net(x)

    pissa.inject(net, rank=4, targets=("up", "down"))             # 1. all else is frozen now
    step0 = (net(x) - before).abs().max().item()
    start = nn.functional.mse_loss(net(x), new_task).item()
    loss = train(net, x, new_task, lr=3e-3, steps=200)
    print(f"step 0: outputs differ by {step0:.1e} from the base model's")
    print(f"loss on the new task: {start:.4f} -> {loss:.4f}")

    with tempfile.TemporaryDirectory() as directory:
        adapter.save(net, directory)                              # 2. a LoRA that PEFT can read
        adapter.load(copy, directory)                             # 3. on the base model
    loaded = (copy(x) - net(x)).abs().max().item()
    print(f"loaded: outputs differ by {loaded:.1e} from the trained model's")

    expected = net(x)
    pissa.merge(net)                                              # plain nn.Linear again
    merged = (net(x) - expected).abs().max().item()
    kinds = sorted({type(m).__name__ for m in net.modules() if not list(m.children())})
    print(f"merged: outputs differ by {merged:.1e}, layers are {', '.join(kinds)}")
    return {"step0": step0, "start": start, "loss": loss, "loaded": loaded, "merged": merged}


if __name__ == "__main__":
    main()
