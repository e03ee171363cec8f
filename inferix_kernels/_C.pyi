"""Compiled kernels, as functions over raw addresses: see csrc/bindings.cpp, of which this file is made.

Made by `python -m tests.house.extension_stub`; a test compares the two. An address is a tensor's data_ptr(), 0 where
the tensor is optional and absent.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

has_cuda: bool
max_pools: int

class Activation:
    none: ClassVar[Activation]
    gelu: ClassVar[Activation]
    gelu_tanh: ClassVar[Activation]
    __members__: ClassVar[dict[str, Activation]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Codec:
    float32: ClassVar[Codec]
    bfloat16: ClassVar[Codec]
    float16: ClassVar[Codec]
    int8_token: ClassVar[Codec]
    int8_channel: ClassVar[Codec]
    e4m3_token: ClassVar[Codec]
    e4m3_channel: ClassVar[Codec]
    u4_token: ClassVar[Codec]
    u4_channel: ClassVar[Codec]
    __members__: ClassVar[dict[str, Codec]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Cpu:
    def __init__(
        self,
        arg0: int,
        arg1: Isa,
        /,
    ) -> None: ...

class DType:
    float32: ClassVar[DType]
    bfloat16: ClassVar[DType]
    float16: ClassVar[DType]
    __members__: ClassVar[dict[str, DType]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Groups:
    def __init__(
        self,
        arg0: int,
        arg1: int,
        /,
    ) -> None: ...

class Isa:
    portable: ClassVar[Isa]
    avx2: ClassVar[Isa]
    avx512: ClassVar[Isa]
    avx512_vnni: ClassVar[Isa]
    avx512_bf16: ClassVar[Isa]
    __members__: ClassVar[dict[str, Isa]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...
    def __lt__(self, other: Isa) -> bool: ...
    def __le__(self, other: Isa) -> bool: ...
    def __gt__(self, other: Isa) -> bool: ...
    def __ge__(self, other: Isa) -> bool: ...

class Norm:
    none: ClassVar[Norm]
    layer: ClassVar[Norm]
    rms: ClassVar[Norm]
    __members__: ClassVar[dict[str, Norm]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class PageList:
    def __init__(
        self,
        arg0: int,
        arg1: int,
        arg2: int,
        /,
    ) -> None: ...

class PageShape:
    def __init__(
        self,
        arg0: int,
        arg1: int,
        /,
    ) -> None: ...

class Plane:
    def __init__(
        self,
        arg0: int,
        arg1: int,
        arg2: int,
        arg3: int,
        arg4: Codec,
        /,
    ) -> None: ...

class Pool:
    def __init__(
        self,
        arg0: Plane,
        arg1: Plane,
        arg2: int,
        /,
    ) -> None: ...

class Rows:
    def __init__(
        self,
        arg0: int,
        arg1: int,
        arg2: int,
        /,
    ) -> None: ...

class Unsupported(Exception): ...

def best_isa() -> Isa: ...
def kv_append(
    *,
    k: Rows,
    v: Rows,
    pages: Pool,
    where: PageList,
    shape: PageShape,
    T: int,
    x_dtype: DType,
    stream: int | None,
    cpu: Cpu,
) -> None: ...
def kv_commit(
    *,
    source: Pool,
    source_list: PageList,
    target: Pool,
    target_list: PageList,
    k_mean: int,
    shape: PageShape,
    stream: int | None,
    cpu: Cpu,
) -> None: ...
def kv_gather(
    *,
    pools: Sequence[Pool],
    where: PageList,
    shape: PageShape,
    k: Rows,
    v: Rows,
    T: int,
    out_dtype: DType,
    stream: int | None,
    cpu: Cpu,
) -> None: ...
def linear(
    *,
    x: int,
    weight: int,
    x_scales: int,
    weight_scales: int,
    bias: int,
    gate: Groups,
    residual: int,
    out: int,
    M: int,
    N: int,
    K: int,
    activation: Activation,
    codec: Codec,
    residual_dtype: DType,
    out_dtype: DType,
    stream: int | None,
    cpu: Cpu,
) -> None: ...
def merge_attention(
    *,
    out_a: int,
    lse_a: int,
    out_b: int,
    lse_b: int,
    out: int,
    lse: int,
    rows: int,
    D: int,
    in_dtype: DType,
    out_dtype: DType,
    stream: int | None,
    cpu: Cpu,
) -> None: ...
def paged_attention(
    *,
    q: Rows,
    out: Rows,
    lse: int,
    pools: Sequence[Pool],
    q_indptr: int,
    page_indptr: int,
    entries: PageList,
    page_bias: int,
    page_variants: int,
    shape: PageShape,
    q_variant_stride: int,
    variants: int,
    T: int,
    query_heads: int,
    segments: int,
    lists_per_segment: int,
    scale: float,
    accumulate: bool,
    eight_bit: bool,
    q_dtype: DType,
    out_dtype: DType,
    workspace: Callable[[int], int],
    stream: int | None,
    cpu: Cpu,
) -> None: ...
def qkv_prologue(
    *,
    qkv: int,
    qkv_stride: int,
    q: int,
    bias: int,
    norm_q: int,
    norm_q_bias: int,
    norm_q_size: int,
    norm_k: int,
    norm_k_bias: int,
    norm_k_size: int,
    rope: int,
    rope_pairs: int,
    k_mean: int,
    interleaved: bool,
    eps: float,
    pages: Pool,
    where: PageList,
    shape: PageShape,
    T: int,
    query_heads: int,
    dtype: DType,
    workspace: Callable[[int], int],
    stream: int | None,
    cpu: Cpu,
) -> None: ...
def quantize_rows(
    *,
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    scale: Groups,
    shift: Groups,
    codes: int,
    scales: int,
    M: int,
    K: int,
    eps: float,
    norm: Norm,
    activation: Activation,
    codec: Codec,
    x_dtype: DType,
    stream: int | None,
    cpu: Cpu,
) -> None: ...

# Only in a build with CUDA.
def probe_load(
    *,
    pages: Pool,
    shape: PageShape,
    eight_bit: bool,
    first_row: int,
    second_row: int,
    head: int,
    keys: int,
    values: int,
    key_scales: int,
    value_scales: int,
    stream: int,
) -> None: ...
def probe_multiply(
    *,
    like: Pool,
    eight_bit: bool,
    values: bool,
    a: int,
    b: int,
    out: int,
    stream: int,
) -> None: ...
