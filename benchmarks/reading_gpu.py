"""How fast a GPU reads its memory, by a Triton kernel that does nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 4096
"""Of 32 bits, that a program reads at a time: 32 for each of its 128 threads, 16 bytes by 16."""
PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit
def _digests(source, digests, count, BLOCK: tl.constexpr):  # noqa: N803 (Triton's own way)
    words = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        total ^= tl.load(source + first + words, mask=first + words < count, other=0)
    tl.store(digests + tl.program_id(0), tl.max(total, 0))


def read(tensor: Tensor, multiprocessors: int) -> Tensor:
    """Read every byte of a tensor; a number of its own for each program, without which nothing would be read."""
    words = tensor.reshape(-1).view(torch.int32)
    programs = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR
    digests = torch.empty(programs, dtype=torch.int32, device=tensor.device)
    _digests[(programs,)](words, digests, words.numel(), BLOCK=WORDS, num_warps=4)
    return digests
