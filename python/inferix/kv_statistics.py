"""What a world's keys and values are like, measured while it runs, and what each format of pages makes of them.

The pages hold what the network gives, as precise as they can. So what is quantized here, aside, is what a store would
quantize: rotated keys, with the frozen mean taken off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from inferix_kernels import KVPages, PageList, Pass, kv_append, kv_gather

from .decode.contract import BlockInput
from .decode.decoder import Decoder
from .finite import NotFinite

OUTLIER = 4.0  # times the median channel of its head: how large a channel must be to be counted
WORST = 4  # channels that are named, of each layer's keys and of its values
POINTS = 13  # of the drift, evenly over the run
QUERIES = 64  # of a forward, whose attention is compared
COMPARED = ("keys", "values", "attention", "attention_mean_kept")  # in each format

T = TypeVar("T")


class Channels:
    """Sums over all tokens of one layer's keys or values, [heads, channels] each."""

    def __init__(self) -> None:
        self.tokens, self.sum, self.squares = 0, torch.tensor(0.0), torch.tensor(0.0)

    def add(self, x: Tensor) -> None:
        """x [tokens, heads, channels]"""
        x = x.double()
        self.tokens += len(x)
        self.sum, self.squares = self.sum.to(x) + x.sum(0), self.squares.to(x) + x.square().sum(0)

    def size(self, mean: Tensor | None = None) -> Tensor:
        """Root mean square of each channel, `mean` [heads, channels] taken off."""
        average, square = self.sum / self.tokens, self.squares / self.tokens
        if mean is not None:
            square = square - 2 * average * mean + mean.square()
        return square.clamp(min=0).sqrt()


class LayerStatistics:
    """One layer's keys and values.

    Attributes:
        mean: [heads, channels], of the first block's keys, as a store that quantizes freezes it.
        drift: how far the mean of a later block's keys is from it, as a share of the keys' size without it.
    """

    def __init__(self) -> None:
        self.keys, self.values = Channels(), Channels()
        self.mean: Tensor | None = None
        self.drift: list[float] = []
        self._errors: dict[str, Tensor] = {}  # format -> squared (error, size) of each of COMPARED

    def add(self, k: Tensor, v: Tensor) -> None:
        """A committed block's, [tokens, heads, channels]."""
        mean = k.double().mean(0)
        if self.mean is None:
            self.mean = mean
        self.keys.add(k)
        self.values.add(v)
        spread = (k.double() - self.mean).square().mean(0).sum().sqrt()
        self.drift.append(float((mean - self.mean).norm() / spread))

    def compare(self, format: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """(what came out, what should have) of each of COMPARED."""
        squares = [[(a - b).double().square().sum(), b.double().square().sum()] for a, b in pairs]
        told = torch.tensor(squares, dtype=torch.float64)
        self._errors[format] = self._errors.get(format, torch.zeros_like(told)) + told

    def report(self) -> dict[str, Any]:
        assert self.mean is not None
        size, centred = self.keys.size(), self.keys.size(self.mean)
        errors = {
            format: dict(zip(COMPARED, map(_short, (made[:, 0] / made[:, 1]).sqrt().tolist())))
            for format, made in self._errors.items()
        }
        return {
            "keys": {**_described(size), "without_mean": _described(centred)},
            "values": _described(self.values.size()),
            "mean_share": _short(float(1 - centred.square().sum() / size.square().sum())),
            "drift": [_short(x) for x in thinned(self.drift)],
            "error": errors,
        }


class Watched:
    """A decode loop whose keys and values are measured. Call `step` in the place of the loop's.

    Args:
        decoder: at its beginning, over pages that do not quantize.
        formats: that are tried on its past.
    """

    def __init__(self, decoder: Decoder, formats: Sequence[str]):
        self.decoder, self.formats = decoder, formats
        self.layers = [LayerStatistics() for _ in range(decoder.model.layers)]
        self._trying = False
        self._model, self._seen = decoder.model, -1
        decoder.model = watched = copy.copy(decoder.model)
        watched.predict = self._predict  # type: ignore[method-assign]
        for branch in getattr(decoder, "branches", ()):
            branch.model = watched

    def step(self, conditioning: Any, trying: bool) -> None:
        """Make a block and note what it commits; `trying`: also what its attention gives over pages of each format."""
        self._trying = trying
        latents = self.decoder.step(conditioning)
        self._trying = False
        if not torch.isfinite(latents).all():
            raise NotFinite(f"model: {self._model.adapter.name} made NaN or infinity: nothing can be said of its keys")
        if self.decoder.commits_alone:
            self.decoder.commit_pending()
        table = self.decoder.table
        if table.next_frame <= self._seen:  # a new rollout
            self._seen = -1
        new = [frame for frame in table.held if frame > self._seen]
        self._seen = max([self._seen, *new])
        for layer, statistics in enumerate(self.layers) if new else ():
            statistics.add(*table.gather(layer, new))

    def _predict(self, inputs: Sequence[BlockInput], attend: Callable[..., Any], *more: Any, **named: Any) -> Any:
        if self._trying:
            attend = _Attend(attend.__self__, self._try)  # type: ignore[attr-defined]
        return self._model.predict(inputs, attend, *more, **named)

    def _try(self, layer: int, q: Tensor, over: Pass) -> None:
        """Attention of the newest block that has a past: of its queries, which are in q as `Pass.read` takes them, over
        each format, beside what it is."""
        plan, store, statistics = over.plan, over.store, self.layers[layer]
        rows, pages = (list(map(slice, ends[:-1], ends[1:])) for ends in (plan.q_indptr, plan.page_indptr))
        known = [i for i, own in enumerate(pages) if (plan.page_ids[own] < store.scratch_page_id).any()]
        if statistics.mean is None or not known:
            return
        ids, lens = plan.page_ids[pages[known[-1]]], plan.page_lens[pages[known[-1]]]
        past, q = ids < store.scratch_page_id, q[..., rows[known[-1]], :, :]
        q = q[..., :: max(1, q.shape[-3] // QUERIES), :, :].float()
        variants = None
        if plan.page_variants is not None:  # of each token: those of the past first, as they are read below
            of_pages = plan.page_variants[pages[known[-1]]].long()
            variants = torch.cat([of_pages[some].repeat_interleave(lens[some]) for some in (past, ~past)])
        k, v = kv_gather(store.layers[layer], PageList(ids[past], lens[past]))
        own_k, own_v = kv_gather(store.layers[layer], PageList(ids[~past], lens[~past]))
        mean = statistics.mean.to(k)
        right = attention(q, torch.cat([k, own_k]), torch.cat([v, own_v]), variants)
        for format in self.formats:
            k8, v8 = through(format, k - mean, v, lens[past], store.page_size)
            whole, _ = through(format, k, v, lens[past], store.page_size)
            values = torch.cat([v8, own_v])
            made, as_is = (attention(q, torch.cat([keys, own_k]), values, variants) for keys in (k8 + mean, whole))
            statistics.compare(format, [(k8, k - mean), (v8, v), (made, right), (as_is, right)])


class _Attend:
    """`Pass.attend` that shows somebody the queries."""

    def __init__(self, over: Pass, show: Callable[[int, Tensor, Pass], None]):
        self.over, self.show = over, show

    def __call__(self, layer: int, *given: Any, out: Tensor | None = None, **norms: Any) -> Tensor | None:
        over = self.over
        with over.turn:
            q = over.turned(over.write(layer, *given, **norms), interleaved=norms.get("interleaved", True))
            self.show(layer, q, over)
            if not over.predict and layer == over.store.num_layers - 1:
                return None
            return over.read(layer, q, out).flatten(1)


def through(format: str, k: Tensor, v: Tensor, lens: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values [tokens, heads, channels] written into pages of a format and read again."""
    pages = KVPages.empty(format, len(lens), k.shape[1], page_size, (k.shape[2], v.shape[2]), k.device)
    where = PageList(torch.arange(len(lens), dtype=torch.int32, device=k.device), lens)
    kv_append(k, v, pages, where)
    return kv_gather([pages], where)


def attention(q: Tensor, k: Tensor, v: Tensor, variants: Tensor | None = None) -> Tensor:
    """q [T, query heads, D] over k, v [tokens, heads, D] -> [T, query heads, D], in float32.

    Args:
        variants: [tokens], of q [V, T, query heads, D] the one that each token meets.
    """
    groups = q.shape[-2] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(-3, -2) @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if variants is not None:
        scores = scores[variants, ..., torch.arange(len(variants), device=q.device)].movedim(0, -1)
    return (scores.softmax(-1) @ v).transpose(0, 1)


def _described(size: Tensor) -> dict[str, Any]:
    """Of the sizes of a layer's channels [heads, channels]: all together, how many stand out, and the worst of them as
    [head, channel, times the median channel of its head]."""
    times = size / size.median(1, keepdim=True).values.clamp(min=torch.finfo(size.dtype).tiny)
    worst = times.flatten().topk(min(WORST, times.numel()))
    named = [
        [*divmod(place, size.shape[1]), _short(value)]
        for place, value in zip(worst.indices.tolist(), worst.values.tolist())
    ]
    return {"rms": _short(float(size.square().mean().sqrt())), "outliers": int((times > OUTLIER).sum()), "worst": named}


def thinned(values: Sequence[T]) -> list[T]:
    """At most POINTS of them, evenly, the first and the last among them."""
    last, points = len(values) - 1, min(len(values), POINTS)
    return [values[round(last * i / max(1, points - 1))] for i in range(points)]


def _short(x: float) -> float:
    return float(f"{x:.3g}")
