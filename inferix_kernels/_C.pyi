"""Compiled kernels, as functions over raw addresses: see csrc/bindings.cpp.

Made by `python -m tests.house.extension_stub`; a test compares the two. `arguments` has a value for every field of the
op's struct in csrc/, and nothing else; a struct within it is a dict in turn. An address is a tensor's data_ptr(), 0
where the tensor is optional and absent.
"""

from typing import ClassVar

cuda_ops: set
has_cuda: bool
max_pools: int
replays: dict

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

class Isa:
    portable: ClassVar[Isa]
    avx2: ClassVar[Isa]
    avx512: ClassVar[Isa]
    avx512_vnni: ClassVar[Isa]
    avx512_bf16: ClassVar[Isa]
    amx: ClassVar[Isa]
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

class Precision:
    exact: ClassVar[Precision]
    eight_bit: ClassVar[Precision]
    automatic: ClassVar[Precision]
    __members__: ClassVar[dict[str, Precision]]
    def __init__(self, value: int) -> None: ...
    def __int__(self) -> int: ...
    def __index__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> int: ...

class Unsupported(Exception): ...

def add_norm(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def best_isa() -> Isa: ...
def default_isa() -> Isa: ...
def describe(
    gradients: bool,
    *values: object,
) -> tuple | None: ...
def kv_append(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def kv_commit(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def kv_gather(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def linear(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def merge_attention(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def paged_attention(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def prepare_attention(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def qkv_prologue(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def quantize_rows(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def raise_to(
    counter: int,
    value: int,
) -> None: ...
def read_tensors_of(
    *args: object,
    dtype: type,
) -> None: ...

# Only in a build with CUDA.
def probe_load(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
def probe_multiply(
    arguments: dict,
    *,
    stream: int | None = None,
    cpu: object = None,
    workspace: object = None,
) -> None: ...
