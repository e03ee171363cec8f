"""The planner's bytes are those that a store allocates, and its largest window really is the largest."""

import dataclasses

import pytest

from inferix_kernels import KVStore, Policy
from inferix_kernels.layout import FORMATS
from inferix_kernels.store.memory import GIB, frame_tokens, page_bytes, plan_memory

WAN = {"layers": 30, "heads": 12, "head_dim": 128, "frame_tokens": frame_tokens(480, 832), "block_frames": 3}
SMALL = {"layers": 3, "heads": 2, "head_dim": 16, "frame_tokens": 21, "block_frames": 3, "page_size": 8}
MIXED = Policy(window=9, sink=2, format="i8f8", sink_format="bf16", older=(5, "int4"))


@pytest.mark.parametrize("format", [f for f in FORMATS if f != "latent8"])
def test_the_plan_is_what_a_store_allocates(format):
    policy = Policy(window=9, sink=1, format=format)
    plan = plan_memory(**SMALL, policy=policy, worlds=2, scratch_format="fp32", archived=4)
    pools, host = ({f: 2 * n for f, n in policy.capacity().items()}, {format: 8})
    store = KVStore(**SMALL, pools=pools, host=host, scratch_format="fp32")
    planned = {name: size for name, size in plan.parts.items() if name != "key means"}
    assert planned == store.nbytes
    assert ("key means" in plan.parts) == store.freezes_mean


# docs/ops.md, bytes of K and V per token and head at D = 128 and pages of 64.
@pytest.mark.parametrize("format, bytes_", [("fp32", 1024), ("bf16", 512), ("int8", 262), ("i8f8", 262), ("int4", 140)])
def test_a_token_takes_what_the_table_of_formats_says(format, bytes_):
    assert abs(page_bytes(format, 1, 64, 128) / 64 / bytes_ - 1) <= 0.03


def test_wan_at_480p_takes_what_is_known_of_it():
    assert WAN["frame_tokens"] == 1560
    # 21 frames of 1560 tokens, 30 layers, 12 heads of 128, K and V in bf16: 6.04 GB, and 2.6% of page padding.
    plan = plan_memory(**WAN, policy=Policy(window=21, format="bf16"))
    assert plan.parts["bf16"] == pytest.approx(6.04e9 * 1600 / 1560, rel=0.01)
    int8 = plan_memory(**WAN, policy=Policy(window=21, format="int8"))
    assert int8.device / plan.device == pytest.approx(268 / 512, rel=0.02)


def test_the_largest_window_fits_and_the_next_does_not():
    plan = plan_memory(**WAN, policy=MIXED, worlds=2, budget=8 * GIB)
    assert plan.fits and plan.largest_window is not None
    at = [
        plan_memory(
            **WAN, policy=dataclasses.replace(MIXED, window=plan.largest_window + more), worlds=2, budget=8 * GIB
        )
        for more in (0, 1)
    ]
    assert at[0].fits and not at[1].fits
    assert "fits" in str(plan) and f"largest window that fits: {plan.largest_window} frames" in str(plan)


def test_weights_take_their_share_of_the_budget():
    policy = Policy(window=21, format="int8")
    past, both = (plan_memory(**WAN, policy=policy, budget=8 * GIB, weights=size) for size in (0, 3 * GIB))
    assert "weights" not in past.parts and both.parts == {"weights": 3 * GIB} | past.parts
    assert past.largest_window > both.largest_window > 21 and "weights      3.000 GiB" in str(both)
    assert not plan_memory(**WAN, policy=policy, budget=8 * GIB, weights=6 * GIB).fits


def test_a_budget_that_is_too_small_says_by_how_much():
    plan = plan_memory(**WAN, policy=Policy(window=21, format="bf16"), budget=GIB)
    assert not plan.fits and plan.largest_window == 3
    assert "does not fit: 4." in str(plan) or "does not fit: 5." in str(plan)
    none = plan_memory(**WAN, policy=Policy(window=21, format="bf16"), budget=GIB // 8)
    assert none.largest_window == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: frame_tokens(481, 832), "height must be a positive multiple of 16 pixels, got 481"),
        (lambda: plan_memory(**WAN, policy=Policy(format="int8")), "frames must be given for a policy without"),
        (lambda: plan_memory(**WAN, policy=Policy(window=9)), "format must be named"),
        (lambda: plan_memory(**WAN, policy=Policy(window=9, format="fp7")), "format must be one of .*, got 'fp7'"),
        (lambda: plan_memory(**WAN, policy=MIXED, worlds=0), "worlds must be at least 1, got 0"),
        (
            lambda: plan_memory(**WAN, policy=MIXED, page_size=0),
            "page_size must be a positive multiple of 8, got 0",
        ),
        (lambda: plan_memory(**WAN | {"layers": -1}, policy=MIXED), "layers must be at least 1, got -1"),
        (lambda: plan_memory(**WAN | {"heads": 1.5}, policy=MIXED), "heads must be a whole number, got 1.5"),
        (lambda: plan_memory(**WAN, policy=MIXED, archived=-1), "archived must be at least 0, got -1"),
        (lambda: plan_memory(**WAN, policy=MIXED, weights=1.5), "weights must be a whole number, got 1.5"),
    ],
)
def test_bad_input_says_what_it_must_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
