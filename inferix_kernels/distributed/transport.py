"""What a schedule asks of whatever moves its bytes: messages posted, and a ticket to wait with.

A message is one blob of bytes between two ranks. It has no header: both sides derive its size from the plan that they
share. How bytes move is all that a transport adds to `Transport`, in one method.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .faults import Where

DEADLINE = 30.0  # seconds
MESSAGES_PER_PEER = 2  # of one post: NCCL has been seen to hang on long lists of them (pytorch #174288, #174942)


class Message(NamedTuple):
    """Bytes to a rank, or from one.

    Args:
        peer: rank in the group.
        blob: uint8 [bytes], contiguous, on the transport's device. Where it is received it is written.

    Example:
        >>> import torch
        >>> from inferix_kernels.distributed import Message
        >>> q = torch.zeros(4, 12, 64, dtype=torch.bfloat16)
        >>> len(Message(3, q.view(-1).view(torch.uint8)).blob)
        6144
    """

    peer: int
    blob: Tensor


def as_blob(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in its memory: uint8 [bytes].

    Example:
        >>> import torch
        >>> from inferix_kernels.distributed.transport import as_blob
        >>> as_blob(torch.ones(2, 3, dtype=torch.bfloat16)).shape
        torch.Size([12])
    """
    return x.view(-1).view(torch.uint8)


class Ticket(Protocol):
    """Messages that were posted together."""

    def wait(self, deadline: float | None = None) -> None:
        """From here on what was sent may be overwritten, and what was received is there. On a GPU that is so for what
        the current stream runs next, and the host waits for no copy. To wait again is free.

        Args:
            deadline: seconds from now; None: the transport's.

        Raises:
            PeerLost: the other side of a message did not come.
        """
        ...


class Transport:
    """One rank's end of a group.

    Messages between two ranks arrive in the order in which they were posted, and every rank must post what its peers
    expect. A blob is left alone between `post` and `wait`.

    Attributes:
        rank: this one's, in the group.
        size: how many ranks the group has.
        device: of all blobs.
        deadline: seconds that a wait takes at most, if it isn't given any.
        sent: bytes that this rank has sent to others, so far.

    Example:
        >>> import torch
        >>> from inferix_kernels.distributed import Message, in_process_group, run_ranks
        >>> def swap(transport):
        ...     other = 1 - transport.rank
        ...     mine, theirs = torch.full((4,), transport.rank, dtype=torch.uint8), torch.empty(4, dtype=torch.uint8)
        ...     transport.post([Message(other, mine)], [Message(other, theirs)]).wait()
        ...     return theirs.tolist()
        >>> run_ranks(in_process_group(2), swap)
        [[1, 1, 1, 1], [0, 0, 0, 0]]
    """

    def __init__(self, rank: int, size: int, device: torch.device, deadline: float = DEADLINE):
        self.rank, self.size, self.device = rank, size, device
        self.deadline = check_deadline(deadline)
        self.sent = 0
        self.where = Where()

    @functools.cached_property
    def beside(self) -> ThreadPoolExecutor:
        """A thread that waits for messages while the rank's own computes: only one of the two may post at a time."""
        return ThreadPoolExecutor(1, thread_name_prefix=f"beside rank {self.rank}")

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """An exception ends the other ranks' waits, with its message."""

    def at(self, op: str, layer: int, block: int) -> None:
        """What `PeerLost` says that this rank waited in, of messages posted from here on. Costs no communication.

        Args:
            op: in words: "ring hop 3 of 7".
            layer, block: their numbers; -1: of none.
        """
        self.where = Where(op, layer, block)

    def post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Ticket:
        """Start to send and to receive: of each, at most two messages for one peer. Empty blobs stay at home.

        Raises:
            TypeError, ValueError: a blob or a peer is none; nothing is sent.
        """
        for name, messages in (("sends", sends), ("receives", receives)):
            peers: list[int] = []
            for i, message in enumerate(messages):
                if not isinstance(message, Message):
                    raise TypeError(f"{name}[{i}] must be a Message, got {type(message).__name__} on rank {self.rank}")
                peer, blob = message
                many = peers.count(peer) == MESSAGES_PER_PEER
                if type(peer) is not int or not 0 <= peer < self.size or peer == self.rank or many:
                    want = f"another rank of 0 to {self.size - 1}, and {MESSAGES_PER_PEER} times at most"
                    self._refuse(f"{name}[{i}].peer", want, repr(peer))
                self._check_blob(f"{name}[{i}].blob", blob)
                peers.append(peer)
        return self._post(sends, receives)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> Ticket:
        """Blob s of `sends` to rank s, and blob r of `receives` from rank r; this rank's own is copied at once.

        Args:
            sends, receives: a blob for each rank; they may be empty.
        """
        self._check_blobs("sends", sends)
        self._check_blobs("receives", receives)
        mine, kept = sends[self.rank], receives[self.rank]
        if len(mine) != len(kept):
            self._refuse(f"receives[{self.rank}]", f"of {len(mine)} bytes like what is sent there", len(kept))
        if mine.data_ptr() != kept.data_ptr():
            kept.copy_(mine)
        # Each begins with the rank after it, so that no rank is everybody's first.
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        return self._post([Message(s, sends[s]) for s in others], [Message(r, receives[r]) for r in others[::-1]])

    def all_gather(self, send: Tensor, receives: Sequence[Tensor]) -> Ticket:
        """This rank's blob to everybody, and blob r of `receives` from rank r, of as many bytes as that rank sends.

        Args:
            receives: a blob for each rank; this one's may be `send` itself.
        """
        self._check_blob("send", send)
        return self.all_to_all([send] * self.size, receives)

    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> Ticket:
        self.sent += sum(len(message.blob) for message in sends)
        return self._begin([m for m in sends if len(m.blob)], [m for m in receives if len(m.blob)])

    def _begin(self, sends: Sequence[Message], receives: Sequence[Message]) -> Ticket:
        """Both checked, and none empty."""
        raise NotImplementedError

    def _check_blobs(self, name: str, blobs: Sequence[Tensor]) -> None:
        if len(blobs) != self.size:
            self._refuse(name, f"a blob for each of {self.size} ranks", len(blobs))
        for i, blob in enumerate(blobs):
            self._check_blob(f"{name}[{i}]", blob)

    def _check_blob(self, name: str, blob: Tensor) -> None:
        if not isinstance(blob, Tensor) or blob.dtype != torch.uint8:
            got = str(blob.dtype).removeprefix("torch.") if isinstance(blob, Tensor) else type(blob).__name__
            raise TypeError(f"{name} must be uint8, got {got} on rank {self.rank}")
        if blob.ndim != 1 or not blob.is_contiguous():
            got = f"{list(blob.shape)} with strides {blob.stride()}"
            self._refuse(name, "[bytes], contiguous", got)
        if blob.device != self.device:
            self._refuse(name, f"on {self.device}", blob.device)

    def _refuse(self, name: str, want: str, got: object) -> None:
        raise ValueError(f"{name} must be {want}, got {got} on rank {self.rank}")


def check_deadline(deadline: float) -> float:
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not 0 < deadline < 1e6:
        raise ValueError(f"deadline must be a positive number of seconds, got {deadline!r}")
    return float(deadline)
