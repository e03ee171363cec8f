"""Every op, with one tensor at a time whose numbers do not lie in memory: a line that names it, never an address."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import inferix_kernels
from inferix_kernels import PageList, Unsupported
from inferix_kernels.__main__ import OPS
from inferix_kernels._dispatch import BACKENDS, run
from inferix_kernels.layout import Quantized
from inferix_kernels.testing import filled_pool
from tests.ops.test_arguments import PLACES, calls, changed
from tests.triton_kernels import triton_mode  # noqa: F401


class Wrapped(torch.Tensor):
    """A subclass that keeps its numbers elsewhere, as DTensor and quantized tensors of other libraries do."""

    @staticmethod
    def __new__(cls, x):
        return torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))


def fake(x):
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)


def emptied(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


FOREIGN = {
    "meta": lambda x: x.to("meta"),
    "fake": fake,
    "wrapped": Wrapped,
    "emptied": emptied,
    "sparse": lambda x: x.to_sparse(),
    "negated": lambda x: torch._neg_view(x),
    "none": lambda x: None,
    "numpy": lambda x: x.view(torch.uint8).numpy(),
}


def may_be_none(op, name, way):
    optional = {"k_mean", "lse", "norm_q", "norm_k", "norm_k_bias", "rope", "bias", "scale", "gate", "residual", "keep"}
    optional |= {"summed"}
    if name == "out":
        return way == ()
    alone = way == () and (name in optional or (op != "linear" and name == "weight"))
    return alone or (name, way) == ("plan", (4,))  # its bias


def every_call():
    """Those of test_arguments, and the ops that have no C++ kernel."""
    found = calls()
    latent, where = filled_pool("latent8", [8, 3], 1, 8, (16, 8))
    plan = inferix_kernels.make_plan([(4, where.ids.tolist(), where.lens.tolist(), [0.0, 1.0])])
    q, out, lse = torch.randn(4, 2, 24), torch.randn(4, 2, 16), torch.randn(4, 2)
    found["latent_attention"] = {"q": q, "pools": [latent], "plan": plan, "scale": 1.0, "out": out, "lse": lse}
    pool, where = filled_pool("int8", [8, 3], 2, 8, 16)
    summaries, scores = torch.randn(pool.pages, 2, 1, 16), torch.randn(1, 2, 2)
    found["page_summaries"] = {"pools": [pool], "where": where, "out": summaries}
    indptr = torch.tensor([0, 4], dtype=torch.int32)
    found["page_scores"] = {"q": torch.randn(4, 4, 16), "q_indptr": indptr, "summaries": summaries, "where": where,
                            "out": scores}  # fmt: skip
    chosen = PageList(*(torch.zeros(2, dtype=torch.int32) for _ in range(2)))
    found["select_pages"] = {"scores": scores, "where": where, "k": 1, "keep": torch.zeros(2, dtype=torch.bool),
                             "out": chosen}  # fmt: skip
    return found


GIVEN = every_call()  # to look at; what is called may write


def places():
    def ways(value, way=()):
        if isinstance(value, torch.Tensor):
            yield way
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                yield from ways(part, (*way, i))

    return [(op, name, way) for op, given in GIVEN.items() for name, value in given.items() for way in ways(value)]


def call(op, arguments, backend):
    return getattr(inferix_kernels, op)(**arguments, backend=backend)


def test_the_calls_are_good_and_reach_every_op():
    assert {op for op, _, _ in places()} == set(OPS)
    assert len(places()) > len(PLACES)
    for op, arguments in every_call().items():
        call(op, arguments, "auto")


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_tensor_without_numbers_in_memory_is_refused(kind, backend):
    tried = 0
    for op, name, way in places():
        arguments = dict(GIVEN[op])  # every call is refused, and nothing is written
        value = at(arguments, name, way)
        if kind == "negated" and not value.dtype.is_floating_point:
            continue
        if kind == "sparse" and value.dtype == torch.float8_e4m3fn:
            continue
        if kind == "none" and may_be_none(op, name, way):
            continue
        arguments[name] = changed(arguments[name], way, FOREIGN[kind])
        with pytest.raises((TypeError, ValueError)) as refusal:
            call(op, arguments, backend)
        message = str(refusal.value)
        assert "\n" not in message and re.match(r"\w[\w.\[\]]* must ", message), (op, name, way, message)
        # Of the first tensor it is the others that are elsewhere.
        assert name in message or (kind == "meta" and "must be on meta like the op's first argument" in message)
        tried += 1
    assert tried > 40


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_calls_without_any_memory_are_refused(kind, backend):
    def all_of(value):
        if isinstance(value, torch.Tensor):
            return FOREIGN[kind](value)
        if isinstance(value, (tuple, list)):
            parts = [all_of(part) for part in value]
            return parts if isinstance(value, list) else type(value)(*parts) if hasattr(value, "_fields") else parts
        return value

    for op, arguments in every_call().items():
        with pytest.raises(ValueError, match="must be a dense tensor in memory, got a "):
            call(op, {name: all_of(value) for name, value in arguments.items()}, backend)


def test_inside_transforms_there_is_no_address_either():
    x = Quantized(torch.ones(3, 8, dtype=torch.int8), torch.ones(3))
    with pytest.raises(ValueError, match="x must be a dense tensor in memory"):
        torch.vmap(lambda row: inferix_kernels.quantize_rows(row[None]).scales)(torch.ones(2, 8))
    with pytest.raises((ValueError, RuntimeError), match="bias"):
        torch.func.grad(lambda bias: inferix_kernels.linear(x, x, bias=bias, dtype=torch.float32).sum())(torch.ones(3))


def at(arguments, name, way):
    value = arguments[name]
    for i in way:
        value = value[i]
    return value


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WITH_GRADIENT = [(op, name, way) for op, name, way in places() if at(GIVEN[op], name, way).dtype in FLOATS]


@pytest.mark.parametrize("op, name, way", WITH_GRADIENT)
def test_no_gradient_stops_in_silence(op, name, way):
    arguments = every_call()[op]
    arguments[name] = changed(arguments[name], way, lambda x: x.requires_grad_())
    with pytest.raises(RuntimeError, match="requires a gradient, and there is no backward"):
        call(op, arguments, "auto")
    with torch.no_grad():
        call(op, arguments, "auto")


@pytest.mark.parametrize("backend", ["auto", "compiled", "triton"])
def test_a_device_of_another_kind_reaches_no_kernel(backend):
    with pytest.raises(Unsupported, match="kv_append: no backend runs on xpu tensors, only on cpu and cuda"):
        run("kv_append", backend, torch.device("xpu"), (), {})


@pytest.mark.filterwarnings("ignore")
def test_a_trace_that_would_not_hold_the_op_is_refused():
    with pytest.raises(RuntimeError, match=r"quantize_rows must not be called under torch\.jit\.trace, which does not"):
        torch.jit.trace(lambda x: inferix_kernels.quantize_rows(x).scales, (torch.ones(3, 8),))
