"""Calls of a kind that was accepted before: nothing is taken by memory that a first call would refuse, and what is run
again is the call at hand."""

import pytest
import torch

import inferix_kernels
from inferix_kernels import PageList, Unsupported, compiled, kv_append, linear, ops, qkv_prologue, quantize_rows
from inferix_kernels import _remembered as memory
from inferix_kernels.layout import KVPages
from tests.ops.test_arguments import PLACES, calls

ERRORS = (TypeError, ValueError, RuntimeError, Unsupported)
ACCEPT = {
    "kv_append": ops._accept_append,
    "kv_commit": ops._accept_commit,
    "paged_attention": ops._accept_attention,
    "merge_attention": ops._accept_merge,
    "qkv_prologue": ops._accept_prologue,
    "quantize_rows": ops._accept_rows,
    "add_norm": ops._accept_add_norm,
    "linear": ops._accept_linear,
}
WHICH = ("compiled", "reference")
READABLE = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch's tensors are read in Python"
)


def run(op, arguments):
    return getattr(inferix_kernels, op)(**arguments, backend="compiled")


def at(value, way):
    for i in way:
        value = value[i]
    return value


def shrunk(x):
    x.set_(x.untyped_storage(), x.storage_offset(), (x.shape[0] - 1, *x.shape[1:]), x.stride())


IN_PLACE = {
    "emptied": lambda x: x.untyped_storage().resize_(0),
    "a row less": shrunk,
    "a gradient": lambda x: x.requires_grad_(),
    "another dtype": lambda x: setattr(x, "data", x.to(torch.int64)),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.op}-{place.argument}-{place.way}")
def test_what_was_changed_in_place_is_refused(place, change):
    arguments = calls()[place.op]
    for _ in range(2):  # made, then run again
        run(place.op, arguments)
    tensor = at(arguments[place.argument], place.way)
    if change == "a gradient" and not tensor.is_floating_point():
        pytest.skip("integers have no gradient")
    if change == "a row less" and place.argument in ("scale", "gate"):
        pytest.skip("a group less may divide the rows too")
    IN_PLACE[change](tensor)
    with pytest.raises(ERRORS):
        run(place.op, arguments)


@READABLE
@pytest.mark.parametrize("op", ACCEPT)
def test_a_call_is_packed_once_and_run_again(op, monkeypatch):
    run(op, calls()[op])
    monkeypatch.setattr(compiled, "_run", None)  # packs the struct
    again = made(op)
    monkeypatch.undo()
    ACCEPT[op].forget()
    torch.testing.assert_close(again, made(op), rtol=0, atol=0, equal_nan=True)


def made(op):
    """Every tensor of a call after it."""
    torch.manual_seed(0)
    arguments = calls()[op]
    run(op, arguments)
    return list(memory.tensors_of(arguments.values()))


def test_other_numbers_of_the_same_kind_are_the_ones_read():
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, w, bias = (torch.randn(*size, generator=generator) for size in ((3, 24), (5, 24), (5,)))
        for codes in (torch.int8, torch.float8_e4m3fn):
            weight = quantize_rows(w, codes, backend="reference")
            for options in ({}, {"bias": bias}, {"residual": bias.expand(3, 5).contiguous()}, {"activation": "gelu"}):
                got = linear(x, weight, dtype=torch.float32, **options)
                want = linear(quantize_rows(x, codes, backend="reference"), weight, dtype=torch.float32,
                              backend="reference", **options)  # fmt: skip
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for eps in (1e-6, 1.0, 1):
            got = quantize_rows(x, norm="layer", eps=eps)
            assert torch.equal(got.codes, quantize_rows(x, norm="layer", eps=eps, backend="reference").codes)


@pytest.mark.parametrize("first", ["one tensor", "two tensors"])
def test_a_tensor_that_is_given_twice_is_no_rule(first):
    """The addresses of a call that was given one tensor in two places are not taken for those of two tensors."""
    x, weight, out = quantize_rows(torch.randn(3, 24)), quantize_rows(torch.randn(5, 24)), torch.zeros(3, 5)
    ops._accept_linear.forget()
    for one in (True, False, True, False) if first == "one tensor" else (False, True, False, True):
        residual = out if one else torch.ones(3, 5)
        want = linear(x, weight, residual=residual.clone(), dtype=torch.float32, backend="reference")
        torch.testing.assert_close(linear(x, weight, residual=residual, out=out), want)


def test_a_tensor_made_on_the_way_is_made_in_every_call():
    """A norm's weights in bfloat16 become float32 in a tensor of the call's own."""
    pages, where = KVPages.empty("fp32", 1, 1, 8, 16), PageList.of([0], [2])
    qkv = torch.randn(2, 3 * 16)
    for scale in (1.0, 2.0, 3.0):
        weight = torch.full((16,), scale, dtype=torch.bfloat16)
        got, want = (
            qkv_prologue(qkv, weight, weight, None, pages, where, backend=b) for b in ("compiled", "reference")
        )
        torch.testing.assert_close(got, want)


def test_numbers_in_a_list_are_looked_at_in_every_call():
    pages, ids = KVPages.empty("fp32", 2, 1, 8, 16), torch.tensor([0], dtype=torch.int32)
    where, k = PageList(ids, torch.tensor([3], dtype=torch.int32)), torch.randn(3, 1, 16)
    for _ in range(2):
        kv_append(k, k, pages, where)
    ids[0] = 2
    with pytest.raises(ValueError, match="2"):
        kv_append(k, k, pages, where)


def test_a_number_is_no_tensor():
    with pytest.raises(TypeError, match="eps must be a number, got a Tensor"):
        quantize_rows(torch.ones(2, 8), norm="rms", eps=torch.tensor(1e-6))
    for eps in (10**400, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^eps must be a finite number, got "):
            quantize_rows(torch.ones(2, 8), norm="rms", eps=eps)


@READABLE
def test_a_key_tells_kinds_apart():
    x = torch.zeros(2, 3)
    alike = [(x, torch.ones(2, 3)), ((1, 2.0, "a"), (1, 2.0, "a")), ([x, None], [x, None])]
    apart = [(x, torch.zeros(3, 2)), (x, torch.zeros(2, 3).double()), (x, torch.zeros(3, 2).T), (1, 1.0), (1, True),
             ((x,), [x]), (0.0, -0.0), (PageList(x, x), (x, x, None)), (torch.int8, torch.uint8), ("a", "b"),
             ((x, x), (x, x.clone())), (((x,), x), (x, (x,)))]  # fmt: skip
    for same, pairs in ((True, alike), (False, apart)):
        for a, b in pairs:
            keys = [memory.describer()(False, value) for value in (a, b)]
            assert None not in keys and (keys[0] == keys[1]) is same, (a, b)
    wants = x.clone().requires_grad_()
    assert memory.describer()(True, x) != memory.describer()(True, wants)
    assert memory.describer()(False, x) == memory.describer()(False, wants)
    parameter = torch.nn.Parameter(x, requires_grad=False)
    assert memory.describer()(False, parameter) == memory.describer()(False, x)
    endless = []
    endless.append(endless)
    for unknown in (endless, torch._neg_view(x), x.to("meta"), x.to_sparse(), x.numpy(), object(), 1 << 70, {}):
        assert memory.describer()(False, unknown) is None


def test_what_is_remembered_has_an_end(monkeypatch):
    monkeypatch.setattr(memory, "MOST", 3)
    ops._accept_rows.forget()
    for rows in range(1, 9):
        assert len(quantize_rows(torch.ones(rows, 8)).scales) == rows
    assert len(ops._accept_rows.known) <= 3


@READABLE
def test_a_key_tells_shapes_and_strides_apart():
    describe, x = memory.describer(), torch.zeros(4, 4)
    alike = [x, x.t(), x[:, :2], x[:2], x.half(), x.view(16), x.view(1, 4, 4), x.expand(4, 4, 4), x[:1].expand(4, 4)]
    assert len({describe(False, each) for each in alike}) == len(alike)


@READABLE
def test_what_does_not_fit_into_a_key_has_none():
    describe, x = memory.describer(), torch.zeros(2)
    assert describe(False, *[x] * 128) is not None
    assert describe(False, *[x] * 129) is describe(False, *["x"] * 129) is describe(False, *range(2000)) is None
