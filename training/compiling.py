"""torch.compile for a network, block by block."""

import torch
from torch import nn
from torch._functorch import config as functorch_config

from dcd.recomputing import blocks_of

# A block is compiled once for each size of its input, in training and in evaluation; equal blocks share that. Past its
# usual limit of 8, PyTorch would go on without compiling, with a warning.
MOST_VERSIONS = 1024


def compile_blocks(model: nn.Module) -> None:
    """Have each block of a network compiled when it is first used; state and names stay as they are.

    Blocks are what stands in the network's `nn.Sequential`s. Equal ones are compiled once, which is what makes this so
    much faster than compiling the network as a whole; what stands outside of blocks is not compiled.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = MOST_VERSIONS
    # `backward()` is called outside of autocast. PyTorch would compile it for the inside.
    functorch_config.backward_pass_autocast = "off"
    for block in blocks_of(model):
        block.compile(dynamic=False)  # sizes as constants: blocks of many sizes would else be taken for one of any size
