"""Which way the ranks of a group share one world: named, or as the planner has it (inferix_kernels.distributed)."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from inferix_kernels import Policy
from inferix_kernels.distributed import (
    Gather,
    Layout,
    PassQ,
    Ring,
    Subgroup,
    Workload,
    measure_device,
    measure_link,
    plan_attention,
    shard_for,
)
from inferix_kernels.distributed.choice import reasons
from inferix_kernels.distributed.sharding import SCHEDULES
from inferix_kernels.distributed.transport import Transport
from inferix_kernels.store import Attention, Shard

from .decode.contract import Model
from .decode.own_branch import OwnBranch
from .models.linears import weight_bytes

PARALLEL = ("auto", *SCHEDULES, "branches")
ATTENTION: Mapping[str, Callable[[Transport], Attention]] = {
    "gather": Gather,
    "ulysses": Gather,  # over a store with some of the heads
    "ring": Ring,
    "pass-q": PassQ,
}
SCHEME = {"alone": "gather", "G": "gather", "U": "ulysses", "R": "ring", "Q": "pass-q"}  # as the planner calls them


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How one rank takes part.

    Attributes:
        schedule: one of SCHEDULES.
        group: the transport of the ranks that share attention.
        shard: what the rank's store holds.
        branch: which of a guided world's predictions this rank's group makes; None: each of them.
        why: the planner's reason, in a line; "" where the way was named.
    """

    schedule: str
    group: Transport
    shard: Shard
    branch: OwnBranch | None = None
    why: str = ""

    @property
    def attention(self) -> Attention:
        return ATTENTION[self.schedule](self.group)

    @classmethod
    def of(
        cls, transport: Transport, parallel: str, model: Model, policy: Policy, share: Callable[[Any], Any]
    ) -> Sharing:
        """As named by `parallel`, or as rank 0 has planned it by what all ranks have measured.

        Args:
            share: gives every rank what rank 0 gives.
        """
        _check(model, policy)
        schedule, parts, branches, why = parallel, None, 1, ""
        if parallel == "auto":
            layout, why = _planned(transport, model, policy, share)
            schedule, parts, branches = SCHEME[layout.scheme], layout.heads, layout.branches
            if schedule == "gather" and parts > 1:
                schedule = "ulysses"  # in groups
        elif parallel == "branches":
            schedule, branches = "gather", 2
            if branches_of(model) != 2 or transport.size % 2:
                raise ValueError(
                    f"parallel must not be branches: it needs a guided model and an even number of ranks, got "
                    f"{model.adapter.name}, guidance {model.adapter.guidance:g}, and {transport.size} ranks"
                )
        if transport.rank == 0:
            said = f"{transport.size} ranks make {model.adapter.name} by {schedule}"
            logging.getLogger("inferix").info(f"{said}, as named" if parallel != "auto" else f"{said}. {why}")
        group, branch = transport, None
        if branches > 1:
            size = transport.size // branches
            mine = transport.rank // size
            group = Subgroup(transport, range(mine * size, (mine + 1) * size))
            branch = OwnBranch(Subgroup(transport, range(group.rank, transport.size, size)))
        return cls(schedule, group, shard_for(schedule, group.rank, group.size, model.heads, parts), branch, why)


def branches_of(model: Model) -> int:
    """Forwards of a step, each with a conditioning and a past of its own, which can so be on ranks of their own."""
    return 2 if model.adapter.guidance != 1 and model.schedule is None else 1


def _check(model: Model, policy: Policy) -> None:
    if policy.past_bias or policy.time != "absolute":
        raise ValueError(
            f"past_bias and time must be 0 and absolute in a world of several ranks, got {policy.past_bias:g} and "
            f"{policy.time} for {model.adapter.name}"
        )


def _planned(transport: Transport, model: Model, policy: Policy, share: Callable[[Any], Any]) -> tuple[Layout, str]:
    """Every rank measures, as a link is measured by all at once; rank 0 plans by its figures, for everybody."""
    if transport.size == 1:
        return Layout("alone"), ""
    link = measure_link(transport)
    memory = _memory(transport) + (0 if model.network is None else weight_bytes(model.network))
    device = measure_device(transport.device, model.dtype, memory)
    plan: tuple[Layout, str] | None = None
    if transport.rank == 0:
        choice = plan_attention(workload(model, policy, transport.size), link, memory, device)
        logging.getLogger("inferix").debug(choice.explain())
        plan = choice.best.layout, reasons(choice)[0]
    found: tuple[Layout, str] = share(plan)
    return found


def workload(model: Model, policy: Policy, ranks: int) -> Workload:
    """What a model's blocks ask of so many ranks, in the planner's terms.

    Example:
        >>> from inferix.models import load_model
        >>> from inferix.sharing import workload
        >>> workload(load_model("tiny"), Policy(window=9, format="int8"), ranks=2).keys  # 9 frames of 64 tokens
        576
    """
    adapter = model.adapter
    frames = adapter.block_frames
    seen = frames if policy.window is None else max(frames, policy.window + policy.sink)
    network = model.network
    weights = 0 if network is None else weight_bytes(network)
    # Of the network's weights almost all are its layers' matrices.
    numbers = 0 if network is None else sum(x.numel() for x in network.parameters())
    return Workload(
        tokens=frames * model.frame_tokens,
        keys=seen * model.frame_tokens,
        heads=model.query_heads,
        kv_heads=model.heads,
        head_dim=model.head_dim,
        ranks=ranks,
        kv_format=policy.format or "bf16",
        branches=branches_of(model),
        layers=model.layers,
        linear=numbers // model.layers,
        weights=weights,
        frame_tokens=model.frame_tokens,
    )


def _memory(transport: Transport) -> float:
    """Bytes that a rank can still take. Ranks on a CPU are taken to be on one machine, and share what it has."""
    if transport.device.type == "cuda":  # never run on a GPU
        return float(torch.cuda.mem_get_info(transport.device)[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / transport.size
