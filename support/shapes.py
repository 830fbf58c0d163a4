"""What a checkpoint says of its matrices, without the weights."""
import torch

import model
import pissa
from formats import meta


def read_config(ckpt):
    """The Config of a checkpoint; its config.json or params.json is enough."""
    directory = model.find(ckpt)
    if (directory / "config.json").is_file():
        from formats import hf
        return model.Config(**hf.read_config(directory / "config.json"))
    if any(directory.glob("consolidated.*.pth")):
        return model.open_checkpoint(ckpt)[0]
    # In place of the tensors: Llama 1 and 2 leave their vocabulary open, and have 32000.
    shard = {"tok_embeddings.weight": torch.empty(32000, 0), "output.weight": None}
    return model.Config(**meta.read_params(directory, [shard]))


def check(args):
    """ValueError if --rank or --targets do not suit the model, before it is read."""
    if args.method != "full" and not args.adapter:
        with torch.device("meta"):
            pissa.find_linears(model.Llama(read_config(args.ckpt)), args.targets, args.rank)
