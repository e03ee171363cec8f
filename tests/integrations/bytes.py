"""Counts the bytes that are allocated while it is on."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """`with Allocations() as made: ...`; made.nbytes is the memory of all tensors that operations returned and that no
    argument of theirs already had."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        known = {place(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor) and place(x) not in known:
                known.add(place(x))
                self.nbytes += x.untyped_storage().nbytes()
        return results


def place(x):
    return x.untyped_storage().data_ptr()
