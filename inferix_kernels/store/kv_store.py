"""The KV store: pools of pages for all layers, shared by any number of worlds.

store = KVStore(layers=30, heads=12, head_dim=128, frame_tokens=1560, block_frames=3, pools={"int8": 21})
table = store.open(Policy(window=18, sink=3))          # one world: see page_table.py
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .attention import Attention, Local
from .page_table import PageTable
from .passes import Pass
from .planning import Part, plan_pass
from .policy import Policy
from .storage import Storage


class KVStore(Storage):
    """Pools of pages, and who holds them.

    A page id means the same page in every layer. Ids count through the pools in their order, then through scratch.
    A frame's tokens begin on a page boundary; its last page may be partly valid. Scratch is one layer deep: a layer's
    noisy keys are read only by its own attention, and the clean pass commits each layer as it goes by.

    Threads: the worlds of a store share its pools and scratch. They may be stepped by several threads, a world by one
    at a time: every operation, and every layer of a pass, has the store to itself (`turn`), so each world computes what
    it would alone. On a GPU the streams of the threads are put in order too; see turns.StreamTurns.

    Args:
        layers, heads, head_dim: of the keys and values (heads is the number of KV heads). head_dim may be the widths
            of keys and values, (D, Dv), for rows of latents (MLA, with heads=1).
        frame_tokens: tokens per latent frame; any count.
        block_frames: frames per block, at most, of blocks that are open beside others.
        scratch_blocks: blocks that a world can have open at once, and that a pass can have, of all its worlds. Two are
            enough to denoise one block of one world at a time: it, and the one before it, whose clean pass shares its
            first forward.
        pools: format -> frames it can hold, over all worlds. See layout.FORMATS, and Policy.capacity.
        host: the same for host memory (pinned if the device is a GPU), where frames wait that no block attends to.
        scratch_format: "fp32", "fp16" or "bf16", how the current block stores K and V; None: as
            layout.scratch_format has it for a network that is not known, on this device.
        page_size: token slots per page, a multiple of 8.
        model: any name; a snapshot is refused by a store of another one.
        precision: of attention's products over quantized pages: "exact", "8bit" or "auto", as for paged_attention.
            On a CPU "auto" becomes "8bit" in the layers of a world whose first block showed that rounding q costs
            hardly more than the rounding of its keys; never in a store that is one of several ranks', which must all
            round alike.
        turn_back: frames -> [R / 2, 2], cos and sin of the rotation that takes queries back by so many frames; only
            worlds whose policy has time="relative" need it.
        shard: what this process holds of worlds that several make together; `heads` still counts all of them. Its
            passes attend by inferix_kernels.distributed.

    Raises:
        ValueError: an argument is not what it must be; nothing was allocated.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, pools={"int8": 12})
        >>> table = store.open(Policy(window=9))
        >>> store.nbytes["int8"] // 12  # bytes of a frame: two layers of one page of 64 tokens
        9472
    """

    def open(self, policy: Policy) -> PageTable:
        """A new, empty world over this store.

        Example:
            >>> other = store.open(Policy(window=6))  # in the store's first format, int8
            >>> other.next_frame
            0
        """
        return PageTable(self, policy)

    def plan(
        self,
        parts: Sequence[Part],
        rope: Tensor | None = None,
        predict: bool = True,
        attention: Attention = Local(),
    ) -> Pass:
        """One pass over open blocks of several worlds of this store: what PageTable.plan is for one.

        Its results, and what it commits, are those of one world after the other. The worlds' queries follow each other,
        in this order.

        Args:
            parts: of different worlds, each with blocks that are open in it, and maybe one of them to commit.
            rope: [tokens of all blocks, R / 2, 2] float32, cos and sin; only `Pass.attend` needs it.
            predict: False if only K and V are wanted: `attend` of the last layer then writes them and returns None.
            attention: how queries attend to what they see: to all of it, or as TopK does.

        Raises:
            ValueError: a block is not open, scratch has too few blocks for so many, or arguments do not fit each other.
            NotResident: a frame to be seen lies in host memory alone.
            OutOfPages: there is no room for all blocks to commit. Whatever is raised, nothing was changed in any world.

        Example:
            >>> worlds = [store.open(Policy(window=6)) for _ in range(2)]
            >>> both = store.plan([Part(world, [world.open_block(frames=3)]) for world in worlds])
            >>> list(both.attend(0, torch.randn(2 * 30, 3 * 2 * 16), None, None).shape)  # tokens of both
            [60, 32]
        """
        return plan_pass(self, parts, rope, predict, attention)
