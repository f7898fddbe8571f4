"""Activation checkpointing (Chen et al., arXiv 1604.06174): what is inside a block is not kept for the backward pass,
but computed again there."""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module, enable: bool = True) -> None:
    """Have each block of a network computed again in the backward pass, in training, or no longer; state and names stay
    as they are.

    Gradients and running statistics are the same as without. Blocks are those of `blocks_of`, compiled or not; nothing
    in them may be random.
    """
    for block in blocks_of(model):
        # A class, not an attribute: a copy of the model, as that of --ema, must call its own block.
        plain = type(block).plain if isinstance(block, _Checkpointed) else type(block)
        block.__class__ = _checkpointed(plain) if enable else plain


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The modules with children in the outermost `nn.Sequential`s."""
    for child in module.children():
        if isinstance(child, nn.Sequential):
            yield from (block for block in child if any(block.children()))
        else:
            yield from blocks_of(child)


class _Checkpointed(nn.Module):
    plain: type[nn.Module]  # the class of the block

    def __call__(self, *inputs):
        if not (self.training and torch.is_grad_enabled()):
            return super().__call__(*inputs)
        return checkpoint(
            super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=self._contexts
        )

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Around the first computation and around the second, which must not count in the statistics of batch norms."""
        return nullcontext(), self._statistics_kept()

    @contextmanager
    def _statistics_kept(self) -> Generator[None]:
        statistics = list(self.buffers())
        before = [values.clone() for values in statistics]
        try:
            yield
        finally:  # PyTorch breaks off the second computation where it has all that it needs
            for values, value in zip(statistics, before, strict=True):
                values.copy_(value)


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {"plain": kind})
