"""Layers that take the same input quantize it once: q, k and v of an attention are often three layers.

Nothing says in advance that they will: a layer looks whether the codes that a sibling made last are of the tensor that
it is given itself. They are if it is the same tensor (a weak reference: it may die) and nobody has written to it since
(torch counts that), in this thread and on this stream. A layer takes codes that it has had no second time: it was
called again, and memory that torch does not see written, by a kernel or from NumPy, may hold other numbers by then.

One entry for a model, so that what is kept is one layer's input in 8 bits, while that lives. It is off within
torch.compile, whose tensors are not there yet; while a CUDA graph is recorded, which must hold all of its work; and for
tensors of torch.inference_mode, whose writes are not counted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Quantized


class Entry(NamedTuple):
    x: weakref.ref[Tensor]
    key: tuple[Hashable, ...]  # of who may take it, and of x's state
    rows: Quantized
    taken: set[int]  # layers, by id: of this thread alone, which is in the key


class SharedInput:
    """The codes of the last input of a model's layers."""

    entry: Entry | None = None  # replaced as a whole: threads at most lose one another's

    def rows(self, layer: object, siblings: Hashable, x: Tensor, quantize: Callable[[], Quantized]) -> Quantized:
        """Codes of x: a sibling's, or made by `quantize`.

        Args:
            siblings: what layers have in common that may take one another's codes.
        """
        if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.is_inference():
            return quantize()
        stream = 0
        if x.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return quantize()
            stream = torch.cuda.current_stream(x.device).cuda_stream
        if x.requires_grad and torch.is_grad_enabled():  # the op says that there is none
            return quantize()
        try:
            place = x.data_ptr(), x.shape, x.stride(), x.dtype  # torch counts no change of `.data`
            key = siblings, x._version, place, threading.get_ident(), stream
        except RuntimeError:  # of a tensor that has no numbers in memory: the op says so
            return quantize()
        entry = self.entry
        if entry is not None and entry.x() is x and entry.key == key and id(layer) not in entry.taken:
            entry.taken.add(id(layer))
            return entry.rows
        rows = quantize()
        self.entry = Entry(weakref.ref(x, self._forget), key, rows, {id(layer)})
        return rows

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        entry = self.entry
        if entry is not None and entry.x is x:
            self.entry = None

    def __getstate__(self) -> dict[str, Any]:  # of a model that is copied or pickled: a copy begins without an entry
        return {}
