"""One forward over open blocks: what each layer does with its q, K and V.

A pass has a part for each world in it (planning.py). The parts' queries follow each other; each reads its own world's
pages alone, and its keys are written with its own world's mean key taken off.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .. import profile
from .._check import check_index
from ..ops import kv_append, kv_commit, qkv_prologue
from . import reading
from .attention import Attend, Attention, Local, Reads, Sharded
from .buffers import Place
from .share import Share
from .table_view import replace_states
from .turns import in_turn

# Of the queries' rounding to the keys': at 1.1 attention's error is sqrt(1 + 1.1^2) = 1.49 times the keys' alone.
MOST_ROUNDING = 1.1


class Pass:
    """One forward over open blocks: its `attend` is all that a layer needs to know of the store.

    It is good for as long as its tables hold what they held: after an edit (a seal, a block dropped, a frame forgotten
    or given other contents) another one is to be planned, and this one refuses to run.

    PageTable.plan and KVStore.plan make it.

    Attributes:
        plan: the page lists of the queries, one segment per block.
        rows: of each frame's tokens, those that this process has: all of them, but in a store that is one of several
            ranks'. Tensors that have a row for each token have these.

    Example:
        >>> store = KVStore(layers=2, heads=2, head_dim=16, frame_tokens=10, block_frames=3, page_size=16,
        ...     pools={"int8": 12})
        >>> table = store.open(Policy(window=9))
        >>> block = table.open_block(frames=3)
        >>> noisy = table.plan([block])
        >>> noisy.plan.page_ids.tolist()  # three frames of one page each: scratch, which comes after the pools
        [12, 13, 14]
    """

    def __init__(
        self,
        reads: Reads,
        shares: Sequence[Share],
        predict: bool,
        attention: Attention,
        attend: Attend,
        turns: Sequence[Tensor] = (),
        place: Place | None = None,
    ):
        self.store, self.turn = reads.store, reads.store.turn
        self.plan, self.predict = reads.plan, predict
        self._reads, self._shares, self._attend, self._turns = reads, shares, attend, turns
        self._exchange = attend if isinstance(attend, Sharded) else None
        self._follows_lists = attention == Local() and reads.plan.page_bias is None and not turns
        self._tokens = sum([block.queries for block in reads.blocks])
        if self._exchange is not None:
            self._tokens = self._tokens // self.store.frame_tokens * (self.rows.stop - self.rows.start)
        self._pages = sum(block.past + block.own for block in reads.blocks)  # without what fills a list up
        self._edits = [(table, table.state.edits) for share in shares for table in share.tables]
        self._place, self._planned = place, 0 if place is None else place.turn
        self._q: Tensor | None = None  # of every layer in turn, as what is attended to
        self._out: Tensor | None = None
        self._rows: Tensor | None = None  # of _out, as `attend` returns them
        self._commits = any(share.final for share in shares)

    @property
    def rows(self) -> slice:
        return self.store.shard.rows(self.store.frame_tokens)

    @in_turn
    def attend(
        self,
        layer: int,
        qkv: Tensor,
        norm_q: Tensor | None,
        norm_k: Tensor | None,
        eps: float = 1e-6,
        *,
        norm_q_bias: Tensor | None = None,
        norm_k_bias: Tensor | None = None,
        interleaved: bool = True,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Normalise, rotate, write, commit what this pass commits, and attend.

        Args:
            qkv: [T, (Hq + 2 H) * D] packed q | k | v of all blocks' tokens, before norm and rotation. T are all tokens
                of the pass or, in a store that is one of several ranks', `rows` of them.
            norm_q, norm_k, eps, norm_q_bias, norm_k_bias, interleaved: as for `qkv_prologue`.
            out: [T, Hq, D] to write to; without it new memory or, where the pass has `PassBuffers`, these.

        Returns:
            [T, Hq * D], or None from the last layer of a pass that predicts nothing.

        Raises:
            RuntimeError: a table was edited, or the pass's buffers given to another one, since the pass was planned.
            ValueError: qkv has not a row for each token of the pass.

        Example:
            >>> qkv = torch.randn(30, (4 + 2 * 2) * 16)  # 4 query heads, 2 KV heads
            >>> list(noisy.attend(0, qkv, torch.ones(16), torch.ones(16)).shape)
            [30, 64]
        """
        with profile.span("prologue"):
            q = self._write(layer, qkv, (norm_q, norm_k, norm_q_bias, norm_k_bias), eps, interleaved)
        if layer == self.store.num_layers - 1:
            self._count_read()
            if not self.predict:
                return None
        out = self._output(q) if out is None else out
        with profile.span("attention"):
            made = self._attend(layer, self.turned(q, interleaved=interleaved), out)
            return self._rows if made is self._out else made.flatten(1)

    @in_turn
    def write(
        self,
        layer: int,
        qkv: Tensor,
        norm_q: Tensor | None,
        norm_k: Tensor | None,
        eps: float = 1e-6,
        *,
        norm_q_bias: Tensor | None = None,
        norm_k_bias: Tensor | None = None,
        interleaved: bool = True,
    ) -> Tensor:
        """The first half of `attend`: normalise, rotate, write K and V to scratch, commit.

        What lies in scratch is this layer's until another layer, or another pass, writes: who attends to it later than
        this call must hold the store's `turn` over both.

        Returns:
            q [T, Hq, D], normalised and rotated, which the next layer overwrites.

        Example:
            >>> list(noisy.write(1, torch.randn(30, (4 + 2 * 2) * 16), None, None).shape)
            [30, 4, 16]
        """
        return self._write(layer, qkv, (norm_q, norm_k, norm_q_bias, norm_k_bias), eps, interleaved)

    def _write(self, layer: int, qkv: Tensor, norms: Sequence[Tensor | None], eps: float, interleaved: bool) -> Tensor:
        layer = check_index("layer", layer, self.store.num_layers)
        self._check("qkv", qkv)
        store, q = self.store, self._queries(qkv)
        norm_q, norm_k, norm_q_bias, norm_k_bias = norms
        for share in self._shares:
            if share.written is None:
                continue
            qkv_prologue(
                share.of(qkv),
                norm_q,
                norm_k,
                share.rope,
                share.pages,
                share.written,
                norm_q_bias=norm_q_bias,
                norm_k_bias=norm_k_bias,
                k_mean=share.k_mean(layer),
                eps=eps,
                interleaved=interleaved,
                out=share.of(q),
                backend=store.backend,
            )
        if self._exchange is not None:
            self._exchange.begin(layer, q)
        if self._commits:
            self._commit(layer, q)
        return q

    @in_turn
    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write keys and values that are ready, [T, heads, D] and [T, heads, Dv], and commit what this pass commits.

        Example:
            >>> noisy.append(0, torch.randn(30, 2, 16), torch.randn(30, 2, 16))
        """
        layer = check_index("layer", layer, self.store.num_layers)
        self._check("k", k)
        self._check("v", v)
        for share in self._shares:
            if share.written is None:
                continue
            keys, mean = share.of(k), share.k_mean(layer)
            keys = keys if mean is None else (keys - mean).to(k.dtype)
            kv_append(keys, share.of(v), share.pages, share.written, backend=self.store.backend)
        if self._exchange is not None:
            self._exchange.begin(layer, None)
        self._commit(layer)

    def turned(self, q: Tensor, *, interleaved: bool = True) -> Tensor:
        """Queries [T, Hq, D] as the pages meet them: [V, T, Hq, D] where the plan has `page_variants`, under a policy
        with time="relative"; else as they are.

        Example:
            >>> noisy.turned(torch.randn(30, 4, 16)).shape
            torch.Size([30, 4, 16])
        """
        return reading.turned(q, self._turns, interleaved) if self._turns else q

    @in_turn
    def read(self, layer: int, q: Tensor, out: Tensor | None = None) -> Tensor:
        """The second half of `attend`, for queries that are ready: attend to what the pass reads and has written.

        Args:
            q: [T, Hq, D], normalised and rotated, or as `turned` returns them.
            out: [T, Hq, D], to write to.

        Returns:
            [T, Hq, Dv].

        Example:
            >>> noisy.append(1, torch.randn(30, 2, 16), torch.randn(30, 2, 16))
            >>> list(noisy.read(1, torch.randn(30, 4, 16)).shape)
            [30, 4, 16]
        """
        layer = check_index("layer", layer, self.store.num_layers)
        variants, first = (len(q), q[0]) if q.ndim == 4 else (1, q)
        self._check("q", first)
        if variants != 1 + len(self._turns):
            raise ValueError(f"q must be in the {1 + len(self._turns)} variants of Pass.turned, got {list(q.shape)}")
        return self._attend(layer, q, self._output(first) if out is None else out)

    @in_turn
    def prepare(self) -> Hashable | None:
        """Get ready for a forward that no Python accompanies: one that a CUDA graph runs, which was captured of a pass
        with the same buffers.

        Returns:
            What that pass must have in common with this one, besides a network: its own `prepare` returned the same.
            None: a forward of this pass can not be replayed. It has no buffers, or freezes mean keys, or does not
            attend by page lists alone: it reads by a bias, or with queries that are turned.

        Raises:
            RuntimeError: as `attend`.

        Example:
            >>> table.abandon()
            >>> block, buffers = table.open_block(frames=3), PassBuffers()
            >>> kinds = [table.plan([block], buffers=buffers).prepare() for _ in range(2)]
            >>> kinds[0] is not None and kinds[0] == kinds[1]
            True
        """
        self._check_planned()
        if self._place is None or not self._follows_lists:
            return None
        layers = range(self.store.num_layers)
        means = [share.k_mean(layer) is not None for share in self._shares for layer in layers]
        if self.store.freezes_mean and not all(means) and self._commits:
            return None
        precision = tuple(map(tuple, self._reads.precision))
        return self._place.kind, len(self.plan.page_ids), self.predict, precision, tuple(means)

    def count(self) -> None:
        """Have the profiler count what all layers read and commit, as `attend` does: of a forward that was replayed.

        Example:
            >>> table.abandon()
            >>> table.plan([table.open_block(frames=3)]).count()
        """
        self._count_read()
        self._count_committed()

    # Of all layers at once: beside the work of each, a count takes longer than all that it has to do.

    def _count_read(self) -> None:
        layers = self.store.num_layers
        profile.count("pages read", (layers if self.predict else layers - 1) * self._pages)

    def _count_committed(self) -> None:
        for share in self._shares:
            for format, _, target in share.commits:
                profile.count(f"pages committed {format}", self.store.num_layers * len(target.ids))

    @property
    def stale(self) -> bool:
        """Was a table edited, or another pass planned in this one's buffers, since it was planned? It refuses to run
        then."""
        try:
            self._check_planned()
        except RuntimeError:
            return True
        return False

    def _check_planned(self) -> None:
        if self._place is not None and self._place.turn != self._planned:
            raise RuntimeError("this pass was planned before another one in the same buffers: plan it again")
        for table, edits in self._edits:
            if table.state.edits != edits:
                raise RuntimeError("this pass was planned before its table was edited: plan another one")

    def _check(self, name: str, x: Tensor) -> None:
        self._check_planned()
        if len(x) != self._tokens:
            raise ValueError(f"{name} must have {self._tokens} rows, one for each token of the pass, got {len(x)}")

    def _commit(self, layer: int, q: Tensor | None = None) -> None:
        store = self.store
        freezing = False
        for share in self._shares:
            fresh = None  # scratch keys had their mean removed, if there is one
            if share.final and store.freezes_mean and share.k_mean(layer) is None:
                keys, _ = store.gather([store.scratch], share.scratch, torch.float32)  # its only block is committed
                fresh = keys.mean(0)
                if share.tables[0].policy.time == "relative":  # a mean would weigh otherwise in each variant of q
                    fresh = torch.zeros_like(fresh)
                if self._exchange is None:
                    share.fresh[layer] = fresh, q is not None and rounds_like_keys(share.of(q), keys - fresh)
                else:  # no rank sees all queries, and the ranks' worlds must stay alike
                    share.fresh[layer] = self._exchange.everywhere(fresh), False
                freezing = freezing or len(share.fresh) == store.num_layers
            for format, source, target in share.commits:
                kv_commit(
                    store.scratch, source, store.pools[format].layers[layer], target, fresh, backend=store.backend
                )
        if layer == store.num_layers - 1:
            self._count_committed()
        if freezing:
            self._freeze()

    def _freeze(self) -> None:
        """Worlds whose first block is committed in all layers have mean keys from here on."""
        done = [share for share in self._shares if len(share.fresh) == self.store.num_layers]
        frozen = [zip(*(share.fresh[layer] for layer in range(self.store.num_layers))) for share in done]
        tables = [table for share in done for table in share.tables]
        for share in done:
            share.fresh.clear()
        pairs = zip(tables, frozen, strict=True)
        replace_states([(table, table.state._replace(k_means=mean, eight_bit=bits)) for table, (mean, bits) in pairs])

    def _queries(self, qkv: Tensor) -> Tensor:
        if self._q is None:
            width = self.store.scratch.head_dim
            heads = qkv.shape[1] // width - 2 * self.store.all_heads
            if heads < 1:
                raise ValueError(
                    f"qkv must be (Hq + 2H) * D wide with H={self.store.all_heads} and D={width}, got {qkv.shape[1]}"
                )
            self._q = self._reads.rows.of("q", (len(qkv), heads, width), qkv.dtype, qkv.device)
        return self._q

    def _output(self, q: Tensor) -> Tensor | None:
        """Where to attend to; None: to new memory, which is the caller's."""
        if self._out is None and self._place is not None:
            shape = (*q.shape[:2], self.store.scratch.value_dim)
            self._out = self._reads.rows.of("out", shape, q.dtype, q.device)
            self._rows = self._out.flatten(1)
        return self._out


def rounds_like_keys(q: Tensor, keys: Tensor) -> bool:
    """Would 8-bit codes with a scale per row cost scores hardly more by rounding q than they cost by rounding keys?

    A row's step is a 127th of its largest number, so the error of a score is as the largest number of the one side
    times the length of the other. On a GPU the answer is no, as looking would cost a wait.

    Args:
        q: [T, Hq, D]; keys: [T, H, D], with their mean removed.
    """
    if q.device.type != "cpu":
        return False
    peak = [(x.float().square().amax(-1).mean() / x.float().square().sum(-1).mean()).sqrt() for x in (q, keys)]
    return bool(peak[0] <= MOST_ROUNDING * peak[1])
