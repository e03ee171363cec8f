"""The fastest backend of `linear`, as it was measured on a device, is what `auto` takes there."""

import itertools
import json

import pytest
import torch

from inferix_kernels import Unsupported, _dispatch, linear, quantize_rows, torch_backend
from inferix_kernels import __main__ as kernels_cli
from inferix_kernels.proofs import prove, race, speeds, stored
from inferix_kernels.proofs.speeds import Layer
from inferix_kernels.proofs.stored import RIGHT, Identity, Proof
from inferix_kernels.testing import assert_close

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HERE = Identity("NVIDIA H200", "9.0", "580.159.04", "0123456789abcdef")
SMALL, LARGE = Layer("int8", 8, 64, 64), Layer("int8", 1024, 64, 64)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "FOLDER", tmp_path / "speeds")
    monkeypatch.setattr(stored, "FOLDER", tmp_path / "proofs")
    monkeypatch.setattr(stored, "identity", lambda device: HERE)
    name_of = speeds.name_of
    monkeypatch.setattr(speeds, "name_of", lambda device: HERE.gpu if device.type == "cuda" else name_of(device))
    speeds.forget()
    stored.forget()
    yield tmp_path / "speeds"
    speeds.forget()
    stored.forget()


def rows(count, codes=torch.int8, terms=64):
    x = torch.randn(count, terms, generator=torch.Generator().manual_seed(count))
    return quantize_rows(x, codes, backend="reference")


def names(device, count, codes=torch.int8, terms=64, columns=64):
    layer = rows(count, codes, terms), rows(columns, codes, terms)
    return [name for name, _ in _dispatch.candidates("linear", device, layer)]


def test_without_a_record_the_order_is_the_tables():
    assert names(CPU, 8) == ["compiled", "reference"]
    assert names(GPU, 8) == ["torch", "triton", "compiled"]


def test_on_a_gpu_what_is_proved_goes_before_torch_and_what_is_wrong_last():
    case = {stored.kernel("linear", "int8"): RIGHT}
    stored.save(Proof(HERE, {"triton": case}))
    assert names(GPU, 8) == ["triton", "torch", "compiled"]
    assert names(GPU, 8, torch.float8_e4m3fn) == ["torch", "triton", "compiled"]  # was not tried
    stored.save(Proof(HERE, {"triton": {stored.kernel("linear", "int8"): "wrong: by 0.3"}}))
    assert names(GPU, 8) == ["torch", "compiled", "triton"]


def test_rows_are_quantized_by_torch_where_nothing_else_can():
    order = [name for name, _ in _dispatch.candidates("quantize_rows", GPU, (torch.zeros(1, 8), torch.int8))]
    assert order == ["triton", "compiled", "torch"]


def test_the_fastest_goes_first_by_the_size_of_the_layer():
    times = {SMALL: {"compiled": 2.0, "torch": 1.0}, LARGE: {"compiled": 1.0, "torch": 2.0}}
    speeds.save(CPU, times)
    assert names(CPU, 8) == ["torch", "compiled", "reference"] and names(CPU, 800) == ["compiled", "torch", "reference"]
    assert names(CPU, 10_000) == ["compiled", "reference"]  # nothing so large was measured
    assert names(CPU, 8, torch.float8_e4m3fn) == ["compiled", "reference"]
    assert names(GPU, 8) == ["torch", "triton", "compiled"]  # another device


def test_a_fast_kernel_that_is_wrong_does_not_run():
    stored.save(Proof(HERE, {"triton": {stored.kernel("linear", "int8"): "wrong: by 0.3"}}))
    speeds.save(GPU, {SMALL: {"triton": 1.0, "torch": 2.0}})
    assert names(GPU, 8) == ["torch", "compiled", "triton"]
    found = dict(_dispatch.candidates("linear", GPU, (rows(8), rows(64))))
    assert "by 0.3" in found["triton"] and not found["torch"]


def test_auto_calls_what_the_record_names(monkeypatch):
    called, product = [], torch_backend.product
    monkeypatch.setattr(torch_backend, "product", lambda *codes: called.append(1) or product(*codes))
    x, weight = rows(8), rows(64)
    want = linear(x, weight)
    assert not called
    speeds.save(CPU, {SMALL: {"compiled": 2.0, "torch": 1.0}})
    assert_close("out", linear(x, weight), want, 64)
    assert called
    linear(x, weight, backend="compiled")
    assert len(called) == 1


@pytest.mark.parametrize("field", ["device", "torch", "build"])
def test_a_record_of_something_else_is_not_used(field):
    path = speeds.save(CPU, {SMALL: {"compiled": 2.0, "torch": 1.0}})
    assert names(CPU, 8)[0] == "torch"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "another"}))
    speeds.forget()
    assert speeds.of_device(CPU) is None and names(CPU, 8)[0] == "compiled"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 1}', '{"layers": [[1, 2, 3, 4, 5]]}'])
def test_a_damaged_record_is_none(text):
    speeds.save(CPU, {SMALL: {"compiled": 2.0}}).write_text(text)
    speeds.forget()
    assert speeds.of_device(CPU) is None and names(CPU, 8)[0] == "compiled"


@pytest.mark.parametrize("size", [0, -8])
def test_a_record_of_a_layer_without_numbers_is_damaged(size):
    speeds.save(CPU, {SMALL: {"torch": 1.0}, SMALL._replace(M=size): {"torch": 1.0}})
    assert speeds.of_device(CPU) is None and names(CPU, 8)[0] == "compiled"


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_a_layer_is_timed_in_every_backend_that_is_right(codes, monkeypatch):
    ticks, said = itertools.count(), []
    found = race.times(codes, Layer("", 20, 24, 32), CPU, ["compiled", "torch"], said.append, lambda: next(ticks))
    assert found == {"compiled": 1, "torch": 1} and not said
    monkeypatch.setattr(torch_backend, "product", lambda x, weight: torch.zeros(len(x), len(weight)))
    found = race.times(codes, Layer("", 20, 24, 32), CPU, ["compiled", "torch"], said.append, lambda: next(ticks))
    assert found == {"compiled": 1} and len(said) == 1 and "is off by" in said[0]


def test_what_is_hopelessly_slow_is_not_timed_at_other_sizes(monkeypatch):
    asked = []

    def times(codes, layer, device, names, said):
        asked.append(names)
        return {name: 21.0 if name == "torch" else 1.0 for name in names}

    monkeypatch.setattr(race, "SIZES", ((16, 24),))
    monkeypatch.setattr(race, "ROWS", (1, 8, 16))
    monkeypatch.setattr(race, "times", times)
    assert race.command("cpu") == 0
    assert asked == 2 * [["compiled", "torch"], ["compiled"], ["compiled"]]
    assert names(CPU, 1, terms=24, columns=16) == ["compiled", "torch", "reference"]


def test_a_backend_that_takes_no_such_layer_says_why(monkeypatch):
    said = []

    def refuse(codes):
        raise Unsupported("not such codes")

    monkeypatch.setattr(torch_backend, "require", refuse)
    assert set(race.times(torch.int8, Layer("", 2, 8, 8), CPU, ["compiled", "torch"], said.append)) == {"compiled"}
    assert said == ["torch: not such codes"]


def test_the_command_measures_and_stores(monkeypatch, capsys):
    monkeypatch.setattr(race, "SIZES", ((16, 24),))
    monkeypatch.setattr(race, "ROWS", (1, 8))
    monkeypatch.setattr(race, "HOPELESS", float("inf"))
    monkeypatch.setattr(race, "SECONDS", 0.0)
    assert kernels_cli.main(["fastest"]) == 0
    out = capsys.readouterr().out
    assert "int8 [8, 24] x [16, 24]  " in out and out.splitlines()[-1].startswith("stored: ")
    record = speeds.of_device(CPU)
    assert len(record.seconds) == 4 and all(set(t) == {"compiled", "torch"} for t in record.seconds.values())


def test_a_kernel_that_is_wrong_on_a_gpu_is_not_timed():
    stored.save(Proof(HERE, {"triton": {stored.kernel("linear", "fp8"): "wrong: no result in time"}}))
    assert race.contenders(GPU, torch.int8) == ["triton", "compiled", "torch"]
    assert race.contenders(GPU, torch.float8_e4m3fn) == ["compiled", "torch"]


@pytest.mark.parametrize("device", ["H200", "cuda:9", "mps"])
def test_a_device_that_is_not_here_is_one_line(capsys, device):
    assert kernels_cli.main(["fastest", device]) == 2
    said = capsys.readouterr().err
    assert "device must be cpu, cuda or cuda:N" in said and said.count("\n") == 1


def test_a_cache_that_can_not_be_written_is_one_line(caches):
    caches.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="record: cannot write"):
        speeds.save(CPU, {})


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_the_layers_kernels_are_proved_too(format):
    kernels = [stored.kernel("quantize_rows", format), stored.kernel("linear", format)]
    seen = []
    prove.prove_in_process(prove.Job("compiled", format, tuple(kernels)), "cpu", lambda *line: seen.append(line))
    assert [line for line in seen if line[1]] == [(name, RIGHT) for name in kernels]
