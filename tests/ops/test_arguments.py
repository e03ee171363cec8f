"""The compiled ops and arguments that are wrong in one place: an exception that names it, never a crash.

`make sanitize` runs these with the address sanitizer, so that a read or write out of bounds is a crash.
"""

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import inferix_kernels
from inferix_kernels import PageList, compiled
from inferix_kernels.layout import KVPages, Quantized
from inferix_kernels.plans import Plan
from inferix_kernels.testing import attention_inputs, filled_pool, rope_table

ERRORS = (TypeError, ValueError, RuntimeError)  # Unsupported is a RuntimeError


def calls() -> dict[str, dict]:
    """One good call of every op, by its arguments."""
    pool, where = filled_pool("int8", [8, 3], 2, 8, 16)
    target, target_list = filled_pool("int4", [8, 3], 2, 8, 16, seed=1)
    exact, _ = filled_pool("bf16", [8, 3], 2, 8, 16)
    k, v = (torch.randn(11, 2, 16) for _ in range(2))
    q, pools, plan = attention_inputs([5, 2], [8, 3], query_heads=4, heads=2, head_dim=16, page_size=8)
    plan = plan._replace(page_bias=torch.zeros(len(plan.page_ids)))
    out, lse = torch.randn(7, 4, 16), torch.randn(7, 4)
    x, weight = (Quantized(torch.ones(rows, 24, dtype=torch.int8), torch.ones(rows)) for rows in (6, 5))
    return {
        "kv_append": {"k": k, "v": v, "pages": pool, "where": where},
        "kv_commit": {
            "source": exact,
            "source_list": where,
            "target": target,
            "target_list": target_list,
            "k_mean": torch.randn(2, 16),
        },
        "kv_gather": {"pools": [pool, exact], "where": where, "out": (k, v)},
        "paged_attention": {"q": q, "pools": pools, "plan": plan, "out": out, "lse": lse},
        "merge_attention": {"out_a": out, "lse_a": lse, "out_b": out * 2, "lse_b": lse + 1},
        "qkv_prologue": {
            "qkv": torch.randn(11, 4 * 32),
            "norm_q": torch.ones(64),
            "norm_k": torch.ones(16),
            "rope": rope_table(11, 8),
            "pages": pool,
            "where": where,
            "norm_k_bias": torch.zeros(16),
            "bias": torch.zeros(128),
            "k_mean": torch.zeros(2, 16),
        },
        "quantize_rows": {
            "x": torch.randn(6, 24),
            "norm": "layer",
            "weight": torch.ones(24),
            "scale": torch.zeros(2, 24),
            "out": x,
        },
        "add_norm": {
            "x": torch.randn(6, 24),
            "gate": torch.ones(3, 24),
            "residual": torch.zeros(6, 24),
            "norm": "layer",
            "weight": torch.ones(24),
            "scale": torch.zeros(2, 24),
            "summed": torch.zeros(6, 24),
            "out": torch.zeros(6, 24),
        },
        "linear": {
            "x": x,
            "weight": weight,
            "bias": torch.zeros(5),
            "gate": torch.ones(3, 5),
            "residual": torch.zeros(6, 5),
            "out": torch.zeros(6, 5),
        },
    }


class Place(NamedTuple):
    """Where a tensor stands in a call: its argument, and the way into that."""

    op: str
    argument: str
    way: tuple[int, ...]


def tensors(value, way=()):
    if isinstance(value, torch.Tensor):
        yield way
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from tensors(part, (*way, i))


PLACES = [
    Place(op, name, way)
    for op, arguments in calls().items()
    for name, value in arguments.items()
    for way in tensors(value)
]


def changed(value, way, change):
    if not way:
        return change(value)
    parts = [changed(part, way[1:], change) if i == way[0] else part for i, part in enumerate(value)]
    return parts if isinstance(value, list) else type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def misaligned(x):
    """The same numbers, one byte further."""
    memory = bytearray(x.numel() * x.element_size() + 1)
    moved = torch.frombuffer(memory, dtype=torch.uint8)[1:]
    moved.copy_(x.contiguous().view(-1).view(torch.uint8))
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)


WRONG = {
    "dtype": lambda x: x.to(torch.int64),
    "device": lambda x: x.to("meta"),
    "one dimension more": lambda x: x[None].expand(3, *x.shape),
    "a row less": lambda x: x[:-1],
    "misaligned": misaligned,
}


def run(place, change):
    arguments = calls()[place.op]
    arguments[place.argument] = changed(arguments[place.argument], place.way, change)
    return getattr(inferix_kernels, place.op)(**arguments, backend="compiled")


def test_the_calls_are_good():
    for op, arguments in calls().items():
        getattr(inferix_kernels, op)(**arguments, backend="compiled")


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.op}-{place.argument}-{place.way}")
def test_a_wrong_tensor_is_refused(place, wrong):
    value = calls()[place.op][place.argument]
    for i in place.way:
        value = value[i]
    if wrong == "misaligned" and value.element_size() == 1:
        pytest.skip("a byte is always aligned")
    if wrong == "a row less" and place.argument in ("scale", "gate"):
        pytest.skip("a group less may divide the rows too")
    if wrong == "one dimension more" and place == Place("paged_attention", "q", ()):
        pytest.skip("q may have variants: the next test")
    with pytest.raises(ERRORS):
        run(place, WRONG[wrong])


def test_variants_without_their_numbers_are_refused():
    with pytest.raises(ValueError, match=r"plan\.page_variants must be given"):
        run(Place("paged_attention", "q", ()), lambda q: q[None].expand(3, *q.shape))


BIAS = Place("paged_attention", "plan", (Plan._fields.index("page_bias"),))
NUMBERS = [place for place in PLACES if place.argument in ("where", "source_list", "target_list", "plan")]
NUMBERS.remove(BIAS)  # any number will do


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    place=st.sampled_from(NUMBERS),
    index=st.integers(0, 20),
    number=st.one_of(st.integers(-3, 20), st.sampled_from([-(2**31), 2**31 - 1, 2**30])),
)
def test_any_number_in_a_list_is_taken_or_refused(place, index, number):
    """Ids, lengths and pointers: what is in range may pass, all else must raise before anything is read."""

    def change(x):
        x = x.clone()
        x[index % len(x)] = number
        return x

    try:
        run(place, change)
    except ERRORS:
        return
    assert 0 <= number <= 20


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.op}-{place.argument}-{place.way}")
def test_strides_are_followed_or_refused(place):
    if place.argument in ("out", "target", "pages"):
        pytest.skip("written")
    try:
        got = run(place, lambda x: torch.stack((x, x), -1)[..., 0])
    except ERRORS:
        return
    want = run(place, lambda x: x)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want))):
        assert a is None or torch.equal(a, b)


def test_the_types_that_are_walked_through():
    """If one of them gets a field, the tests above reach it."""
    assert all(issubclass(kind, tuple) for kind in (KVPages, PageList, Plan, Quantized))


FIELDS = {
    "one missing": (lambda fields: fields.pop("rows"), "rows is missing"),
    "one too many": (lambda fields: fields.update(row=1), "there is no field row"),
    "a fraction": (lambda fields: fields.update(rows=1.5), "rows cannot be 1.5"),
    "none of an enumeration": (lambda fields: fields.update(in_dtype=None), "in_dtype cannot be None"),
    "a part of a struct": (lambda fields: fields.update(in_dtype={}), "in_dtype cannot be {}"),
}


@pytest.mark.parametrize("wrong", FIELDS)
def test_a_struct_is_filled_by_name(wrong):
    """What compiled.py hands to a kernel has a value for every field of csrc's struct, and nothing else."""
    fields, message = dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b", "out", "lse", "rows"), 0), FIELDS[wrong][1]
    fields |= {"D": 16, **dict.fromkeys(("in_dtype", "out_dtype"), compiled._C.DType.float32)}
    how = {"cpu": {"threads": 1, "isa": compiled.ISA}}
    compiled._C.merge_attention(dict(fields), **how)
    FIELDS[wrong][0](fields)
    with pytest.raises(TypeError, match=message):
        compiled._C.merge_attention(fields, **how)


def test_a_struct_within_a_struct_names_its_field():
    with pytest.raises(TypeError, match="k: head_stride is missing"):
        compiled._C.kv_append({"k": {"data": 0, "token_stride": 1}}, cpu={"threads": 1, "isa": compiled.ISA})


def test_scratch_memory_is_not_the_callers_to_give(monkeypatch):
    monkeypatch.setattr(compiled, "_run", lambda op, like, **fields: seen.append(fields))
    seen = []
    q, pools, plan = attention_inputs([1], [1], query_heads=1, heads=1, head_dim=16, page_size=8)
    inferix_kernels.paged_attention(q, pools, plan, backend="compiled")
    with pytest.raises(TypeError, match="workspace is not the caller's to give"):
        compiled._C.paged_attention({**seen[0], "workspace": 0}, cpu={"threads": 1, "isa": compiled.ISA})
    for pools in (None, 3, {}):
        with pytest.raises(TypeError, match=r"^pools: must be a sequence of pools$"):
            compiled._C.paged_attention({**seen[0], "pools": pools}, cpu={"threads": 1, "isa": compiled.ISA})
