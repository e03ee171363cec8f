"""The KV store: where keys and values lie, who holds them, and the passes that write and read them.

Where a frame lies is counted in three ways, which have three names:

| name | counts | used by |
|---|---|---|
| slot | frames of one pool: `Slot.index` | what is taken, held and freed |
| pool page | pages of one pool, in one layer: `Slot.pool_page` | ops on one pool: kv_append, kv_commit |
| page id | pages of a layer through its pools, scratch last: `Slot.page_id` | ops on a layer's pools |

With n pages per frame, the frame in slot i has the pool pages i * n to i * n + n - 1, and the page ids that follow
from adding its pool's `first_page_id`.

Each module imports only those above it:

| module | holds |
|---|---|
| turns, policy | threads one at a time; what a world keeps |
| slots, extent | places for frames, and who has them; one frame's keys and values |
| shard | what one of several processes holds |
| past | what a world holds, as one value that every edit replaces |
| reading | a bias on the past, and time counted anew: what page lists do not say |
| page_lists, buffers, copies | page lists of frames; memory that passes share; copies to and from host memory |
| storage | all pools: taking slots, converting, host memory |
| table_view | one world, to be read |
| attention | how the queries of a pass attend |
| share, passes, planning | one forward: writes, commits and attends, layer by layer; what it reads and writes |
| boundary, page_table | one world, with its edits |
| kv_store | a store of worlds |
| snapshot; memory | a world on disk; how many bytes a world takes |
"""

from .attention import Attention, Local, TopK
from .buffers import PassBuffers
from .extent import Extent
from .kv_store import KVStore
from .page_table import PageTable
from .passes import Pass
from .past import Block, Past
from .planning import Part
from .policy import Policy
from .shard import Shard
from .slots import NotResident, OutOfPages, Pool, Slot

__all__ = [
    "Attention",
    "Block",
    "Extent",
    "KVStore",
    "Local",
    "NotResident",
    "OutOfPages",
    "PageTable",
    "Part",
    "Pass",
    "PassBuffers",
    "Past",
    "Policy",
    "Pool",
    "Shard",
    "Slot",
    "TopK",
]
