"""Which way ranks share a world: rank 0 plans, and what is named on the command line is what there is."""

import dataclasses

from inferix import sharing
from inferix.commands.configs import GenerateConfig
from inferix.models import load_model
from inferix.ranks import Ranks
from inferix_kernels import Policy
from inferix_kernels.distributed import in_process_group, run_ranks


def test_rank_0_plans_for_all(monkeypatch):
    """By its own figures: nothing would fit what rank 1 finds."""
    model, memory = load_model("tiny"), {0: 1e9, 1: 1.0 - sharing.weight_bytes(load_model("tiny").network)}
    monkeypatch.setattr(sharing, "_memory", lambda transport: memory[transport.rank])
    monkeypatch.setattr(sharing, "measure_device", lambda *args: "h200")

    def rank(transport):
        policy = Policy(window=9, format="int8")
        found = sharing.Sharing.of(transport, "auto", model, policy, Ranks(transport).share)
        return found.schedule, found.why

    one, other = run_ranks(in_process_group(2), rank)
    assert one == other and "Chosen:" in one[1]


def test_the_command_line_names_all_ways():
    (parallel,) = (field for field in dataclasses.fields(GenerateConfig) if field.name == "parallel")
    assert tuple(parallel.metadata["option"].choices) == sharing.PARALLEL
