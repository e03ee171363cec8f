"""The Hopper attention kernel in parts, in the order of a first meeting with a GPU: a load, a product. Emulated on the
CPU, and on a GPU if there is one."""

import pytest
import torch

from inferix_kernels import KVPages, PageList, compiled, reference
from inferix_kernels.layout import FORMATS
from inferix_kernels.sass import KINDS
from inferix_kernels.testing import filled_pool
from tests.cuda import machine

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_gpu = pytest.mark.skipif(
    not (HOPPER and compiled.HAS_CUDA), reason="needs a Hopper GPU, an extension built with nvcc"
)


class Gpu(machine.Probes):
    """On a GPU."""

    device = "cuda"

    def __init__(self):
        pass

    def run(self, op, like, /, **arguments):
        getattr(compiled._C, op)(arguments, stream=torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return machine.Probes(tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="module", params=["host", pytest.param("gpu", marks=[pytest.mark.gpu, on_gpu])])
def gpu(request):
    return Gpu() if request.param == "gpu" else request.getfixturevalue("emulated")


def test_the_kinds_are_those_of_the_kernels(emulated):
    """In their order, which is how `readable` names a kernel."""
    ours = {
        name: (tuple(int(compiled._CODECS[codec]) for codec in FORMATS[format]), eight_bit)
        for name, (format, eight_bit) in KINDS.items()
    }
    assert list(emulated.kinds().items()) == list(ours.items())


def tile_offsets(rows: int, width: int) -> torch.Tensor:
    """[rows, width]: where each byte of a tile lies in shared memory. 128 bytes of a row to a panel, chunks of 16
    permuted by the row's place among the eight (128-byte rows) or by half of it among the eight (64-byte rows)."""
    wide = min(width, 128)
    row, byte = torch.arange(rows)[:, None], torch.arange(width)[None]
    linear = byte // wide * rows * wide + row * wide + byte % wide
    line = linear // 128 % 8
    flip = line if wide == 128 else line % 4
    return linear // 128 * 128 + (linear // 16 % 8 ^ flip) * 16 + linear % 16


def order_of(rows: int) -> torch.Tensor:
    """What lies in each row of a loaded unit: of 8-bit keys which key, of their values which channel. 16a + 4c + 2j + b
    in row 16a + 8j + 2c + b."""
    row = torch.arange(rows)
    return row // 16 * 16 + row // 2 % 4 * 4 + row // 8 % 2 * 2 + row % 2


def unit(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).cpu()


@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_1_tma_brings_a_key_tile(gpu, kind, D, page_size):
    format, eight_bit = KINDS[kind]
    H, head = 3, 2
    pool, where = filled_pool(format, [page_size] * 5, H, page_size, D, gpu.device)
    pages = where.ids[:2].tolist()  # of seven, in a random order
    width = D if eight_bit else 2 * D
    keys, values = (torch.zeros(128 * width, dtype=torch.uint8, device=gpu.device) for _ in range(2))
    scales = torch.zeros(128, device=gpu.device), torch.zeros(2, D, device=gpu.device)
    slot = slice(page_size - 64, page_size)  # the last 64 of a page
    first, second = (page * H * page_size + slot.start for page in pages)
    gpu.load(pool, eight_bit, (first, second), head, keys, values, *scales)
    codecs = FORMATS[format]
    by_token, transposed = codecs.k.scaled_by == "token", codecs.v.transposed
    for u, page in enumerate(pages):
        k, v = (torch.empty(page_size, H, D, device=gpu.device) for _ in range(2))
        reference.kv_gather([pool], PageList.of([page], [page_size], gpu.device), out=(k, v))
        want_k = pool.k[page, head, slot] if by_token else k[slot, head].to(multiplied(kind, 0))
        want_v = v[slot, head].to(multiplied(kind, 1))
        if eight_bit:
            want_k, want_v = want_k[order_of(64)], pool.v[page, head, :, slot][order_of(D)]
        elif transposed:
            want_v = want_v.mT
        got_k = keys.cpu()[tile_offsets(128, width)][64 * u : 64 * u + 64]
        if transposed:
            got_v = values.cpu()[64 * width * u :][tile_offsets(D, 64 * width // D)]
        else:
            got_v = values.cpu()[tile_offsets(128, width)][64 * u : 64 * u + 64]
        if eight_bit or kind in ("bf16", "f16"):
            assert torch.equal(got_k, unit(want_k)) and torch.equal(got_v, unit(want_v))
        else:  # a product and a sum may be rounded once or twice
            same_number(got_k, want_k.bfloat16())
            same_number(got_v, want_v)
        if by_token:
            assert torch.equal(scales[0][64 * u : 64 * u + 64], pool.k_scales[page, head, slot])
        if eight_bit:
            assert torch.equal(scales[1][u], pool.v_scales[page, head])


def same_number(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.contiguous().view(torch.bfloat16), want.cpu().contiguous(), rtol=2**-7, atol=1e-6)


def codes(gpu, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype).to(gpu.device)


def probe(gpu, kind: str, D: int, values: bool, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    format, eight_bit = KINDS[kind]
    like = KVPages.empty(format, 1, 1, 64, D, gpu.device)
    out = torch.full((64, D if values else 128), torch.nan, device=gpu.device)
    gpu.multiply(like, eight_bit, values, a, b, out)
    return out.double()


def multiplied(kind: str, side: int) -> torch.dtype:
    """What the tensor cores are given: keys (0) or values (1)."""
    format, eight_bit = KINDS[kind]
    return FORMATS[format][side].dtype if eight_bit or kind == "f16" else torch.bfloat16


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_2_scores_are_exact_sums(gpu, kind, D):
    dtype = multiplied(kind, 0)
    q, k = codes(gpu, (64, D), dtype), codes(gpu, (128, D), dtype)
    assert torch.equal(probe(gpu, kind, D, False, q, k), q.double() @ k.double().mT)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_2_weighted_values_are_exact_sums(gpu, kind, D):
    dtype = multiplied(kind, 1)
    weights = torch.randint(9, (64, 128), generator=torch.Generator().manual_seed(5)).float().to(gpu.device)
    if FORMATS[KINDS[kind][0]].v.transposed:
        v = codes(gpu, (2, D, 64), dtype)
        keys_first = v.double().transpose(1, 2).reshape(128, D)
        if KINDS[kind][1]:
            keys_first = keys_first[:, order_of(D).argsort()]
    else:
        v = codes(gpu, (128, D), dtype)
        keys_first = v.double()
    assert torch.equal(probe(gpu, kind, D, True, weights, v), weights.double() @ keys_first)
