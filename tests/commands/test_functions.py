"""The commands as functions of a program: what they give back, and errors that speak of arguments."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import inferix
from inferix.commands import cli, doctor
from inferix.commands.configs import ConvertConfig, DoctorConfig, GenerateConfig, InspectKvConfig, PlayConfig
from inferix.commands.options import KINDS, declared
from inferix.models.tiny.model import TinyConfig, TinyWorldModel
from inferix.models.tiny.train import export
from inferix.world import World
from inferix_kernels.layout import KV_FORMATS

CONFIGS = (GenerateConfig, PlayConfig, ConvertConfig, DoctorConfig, InspectKvConfig)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    export(TinyWorldModel(TinyConfig(dim=32, layers=1, heads=2, head_dim=16, ffn=32)), path, {})
    return path


def test_generate_gives_what_it_made_and_prints_nothing(weights, tmp_path, capsys):
    video = inferix.generate(weights=weights, seconds=0.5, seed=3, out=tmp_path / "v.mp4")
    assert capsys.readouterr() == ("", "")
    assert (video.path, video.frames, video.seconds) == (tmp_path / "v.mp4", 8, 0.5)
    assert video.contact_sheet.exists() and video.summary_path.exists()
    assert {type(video.summary[name]) for name in ("fps", "first_block_seconds")} == {float}, "Python's, not NumPy's"
    assert video.measures == video.summary["measures"] and set(video.measures) >= {"player exactly once"}
    words = ["--weights", weights, "--seconds", "0.5", "--seed", "3", "--out", tmp_path / "typed.mp4"]
    assert cli.main(["generate", *map(str, words)]) == 0
    assert (tmp_path / "typed.mp4").read_bytes() == video.path.read_bytes()


def test_a_config_is_made_once_and_varied(weights, tmp_path):
    config = GenerateConfig(weights=str(weights), seconds=0.2, out=str(tmp_path / "a.mp4"))
    first = inferix.generate(config)
    other = inferix.generate(config, seed=1, out=tmp_path / "b.mp4")
    assert first.path != other.path and first.contact_sheet.read_bytes() != other.contact_sheet.read_bytes()
    assert config.seed == 0, "it is as it was"


def test_generate_runs_in_any_thread(weights, tmp_path):
    """Where there is no Ctrl-C to wait for."""
    made = []
    thread = threading.Thread(
        target=lambda: made.append(inferix.generate(weights=weights, seconds=0.2, out=tmp_path / "v.mp4"))
    )
    thread.start()
    thread.join()
    assert made[0].frames == 3


@pytest.mark.parametrize("blocks, left", [(0, []), (2, ["v.json", "v.mp4", "v.png"])])
def test_an_interrupt_comes_up_once_the_video_is_closed(blocks, left, weights, tmp_path, monkeypatch):
    step, calls = World.advance, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > blocks:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    monkeypatch.setattr(World, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        inferix.generate(weights=weights, seconds=0.5, out=tmp_path / "v.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == left


BAD = [
    (inferix.generate, {"seconds": -1}, "seconds must be a positive number, got -1"),
    (inferix.generate, {"seconds": "4"}, "seconds must be a finite number, got '4'"),
    (inferix.generate, {"seconds": float("nan")}, "seconds must be a finite number, got nan"),
    (inferix.generate, {"seconds": 10**400}, "seconds must be a finite number, got 1000"),
    (inferix.generate, {"out": "v.json"}, "out must end in .mp4, got 'v.json'"),
    (inferix.generate, {"weights": ""}, "weights: "),
    (inferix.generate, {"precision": "16bit"}, "precision must be one of auto, exact, 8bit, got '16bit'"),
    (inferix.generate, {"seed": 1.5}, "seed must be a whole number, got 1.5"),
    (inferix.generate, {"seed": True}, "seed must be a whole number, got True"),
    (inferix.generate, {"lora": "a.safetensors"}, "lora must be a list of texts, got 'a.safetensors'"),
    (inferix.generate, {"size": (480,)}, "size must be (height, width), got (480,)"),
    (inferix.generate, {"model": None}, "model must be text, got None"),
    (inferix.generate, {"out": 3}, "out must be a path, got 3"),
    (inferix.generate, {"fp8": "drop"}, "fp8 must be one of keep, dequantize, got 'drop'"),
    (inferix.generate, {"resume": 1}, "resume must be True or False, got 1"),
    (inferix.generate, {"prompt": "a", "prompt_file": "b"}, "prompt_file must not be given together with `prompt`"),
    (inferix.generate, {"scale": 0}, "scale must be at least 1, got 0"),
    (inferix.play, {"worlds": 0}, "worlds must be at least 1, got 0"),
    (inferix.play, {"terminal": True, "port": 1}, "port: for the page only, not with `terminal`"),
    (inferix.convert, {"source": "nowhere", "out": "x.pt"}, "out must end in .safetensors, got 'x.pt'"),
    (inferix.doctor, {"device": "H300"}, "device must be cpu, cuda, cuda:N, sm_NN or one of "),
]


@pytest.mark.parametrize("command, options, says", BAD, ids=[says[:50] for _, _, says in BAD])
def test_errors_speak_of_arguments(command, options, says):
    with pytest.raises(ValueError) as error:
        command(**options)
    assert str(error.value).startswith(says) and "--" not in str(error.value)


def test_what_is_no_option_is_a_type_error():
    with pytest.raises(TypeError, match="length"):
        inferix.generate(length=3)


@pytest.mark.parametrize("config", ["v.mp4", {"seconds": 1}, PlayConfig()], ids=["text", "dict", "of another command"])
def test_what_is_no_config_is_a_type_error(config):
    with pytest.raises(TypeError, match=r"^config must be a GenerateConfig, got "):
        inferix.generate(config)


def test_a_script_that_plays_as_it_is_imported_is_told_so(tmp_path):
    """Its worlds' process imports it."""
    (tmp_path / "script.py").write_text("import inferix\ninferix.play(port=0)\n")
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.count("The tiny world is at") == 1
    assert 'RuntimeError: in a script, call play under `if __name__ == "__main__":`' in done.stderr


@pytest.mark.parametrize(
    "words, says",
    [
        (["generate", "--seconds", "x"], "inferix generate: argument --seconds: "),
        (["generate", "--length", "3"], "inferix: unrecognized arguments: --length 3"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "inferix generate: argument --prompt-file: not allowed"),
        (["convert", "a"], "inferix convert: the following arguments are required: out"),
        ([], "inferix: the following arguments are required: command"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_and_exit_code_2(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(says) and said.count("\n") == 1


@pytest.mark.parametrize(
    "text, typed",
    [
        ("seconds must be at least 1, got 0", "--seconds must be at least 1, got 0"),
        ("prompt_file: 'x' holds no prompt", "--prompt-file: 'x' holds no prompt"),
        ("window, sink: not here", "--window, --sink: not here"),
        ("out: 'v.png' is there, see `resume`", "--out: 'v.png' is there, see --resume"),
        ("frames must be whole blocks", "frames must be whole blocks"),
        ("window, frames: not here", "window, frames: not here"),
        ("the seed must be small, `frames` too", "the seed must be small, `frames` too"),
    ],
)
def test_the_command_line_speaks_of_options(text, typed):
    assert cli.as_typed(text, GenerateConfig) == typed


def test_what_is_given_by_its_place_keeps_its_name():
    assert cli.as_typed("out must end in .safetensors", ConvertConfig) == "out must end in .safetensors"


def test_an_error_in_a_prompt_file_is_said_to_be_there(weights, tmp_path, capsys):
    (tmp_path / "prompts").write_text("0 purple night\n")
    words = ["--weights", weights, "--out", tmp_path / "v.mp4", "--prompt-file", tmp_path / "prompts"]
    assert cli.main(["generate", *map(str, words)]) == 2
    assert capsys.readouterr().err.startswith("inferix generate: --prompt-file: prompt: unknown word 'purple'")


def test_doctor_finds_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"good": lambda: (True, "here"), "bad": lambda: (False, "not here")})
    findings = inferix.doctor()
    assert [dataclasses.astuple(found) for found in findings] == [("good", True, "here"), ("bad", False, "not here")]
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.startswith("ok  good: here\n!!  bad: not here\n")


def test_doctor_names_a_kernel_for_every_format():
    findings = inferix.doctor(device="H200")
    assert [found.name for found in findings] == [f"kv {name}" for name in KV_FORMATS]
    assert all(found.text for found in findings)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_is_declared_with_a_type_that_is_checked_and_a_help(config):
    for each in declared(config):
        assert each.type in KINDS and each.option.help
        assert each.option.to in ("", "model", "world", "server")
        assert each.option.instead_of in ("", *(other.name for other in declared(config)))


def test_options_that_commands_share_are_declared_once():
    shared = {each.name: each for each in declared(GenerateConfig)}
    both = [each for each in declared(PlayConfig) if each.name in shared]
    assert len(both) == 18 and all(each == shared[each.name] for each in both)
    own = [name for config in CONFIGS for name in vars(config).get("__annotations__", {})]
    assert sorted(name for name in set(own) if own.count(name) > 1) == ["out"], (
        "of generate, convert and inspect-kv, three things"
    )


def test_the_command_line_leaves_defaults_to_the_dataclass():
    given = vars(cli._parser().parse_args(["generate", "--special-tokens", "a,b", "--lora", "x", "--lora", "y=2"]))
    assert given == {"command": "generate", "special_tokens": ("a", "b"), "lora": ["x", "y=2"]}
    given = vars(cli._parser().parse_args(["play", "--rtmp", "a.mp4", "--size", "48x80"]))
    assert given == {"command": "play", "push": ["a.mp4"], "size": (48, 80)}


def test_argparse_is_known_to_one_module_of_the_driver_alone():
    folder = Path(inferix.__file__).parent
    users = {path for path in folder.rglob("*.py") if "import argparse" in path.read_text()}
    names = ("evaluate/tiny_studies.py", "models/tiny/evaluate.py", "models/tiny/train.py", "profile/__main__.py")
    programs = {folder / name for name in names}
    assert users - programs == {folder / "commands/cli.py"}


@pytest.mark.parametrize(
    "code",
    [
        "from inferix.commands.cli import main; main(['generate', '--help'])",
        "from inferix import GenerateConfig, PlayConfig; GenerateConfig(model='tiny', seconds=4)",
    ],
)
def test_help_and_configs_wait_for_no_library(code):
    code = f"import sys\ntry:\n    {code}\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "inferix.commands.configs" in done.stderr
    assert not {"torch", "numpy", "av", "rich", "aiohttp"} & set(done.stderr.split())


def test_numbers_of_numpy_are_numbers():
    config = GenerateConfig(seed=np.int64(3), seconds=np.float32(0.5))
    assert (config.seed, config.seconds) == (3, 0.5)
    assert type(config.seed) is int and type(config.seconds) is float, "which a journal can hold"


def test_lists_are_kept_as_tuples():
    assert (
        GenerateConfig(lora=["a", "b=2"]) == GenerateConfig(lora=("a", "b=2")) and PlayConfig(push=[]) == PlayConfig()
    )
    assert hash(GenerateConfig(size=[48, 80])) == hash(GenerateConfig(size=(48, 80)))
