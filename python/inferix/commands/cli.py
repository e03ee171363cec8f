"""The command line: `inferix generate`, `inferix play`, `inferix convert`, `inferix inspect-kv`, `inferix evaluate`,
`inferix doctor`.

Built from the declarations in configs.py; a command is the module of its name and has `run(config) -> exit code`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..launcher import launched_rank, say
from .configs import (
    ConvertConfig,
    DoctorConfig,
    EvaluateConfig,
    EvaluateDatasetConfig,
    EvaluatePairConfig,
    GenerateConfig,
    InspectKvConfig,
    PlayConfig,
)
from .options import KINDS, Declared, Options, declared

FAILED, USAGE, INTERRUPTED = 1, 2, 130
COMMANDS: dict[str, tuple[type[Options], str]] = {
    "generate": (GenerateConfig, "make a video of a world"),
    "play": (PlayConfig, "steer a world in the browser, or in this terminal"),
    "convert": (ConvertConfig, "write a Wan checkpoint as one safetensors file that needs no other"),
    "inspect-kv": (InspectKvConfig, "measure a model's keys and values, and what each page format costs it"),
    "evaluate": (EvaluateConfig, "measure how the quality of videos drifts"),
    "evaluate pair": (
        EvaluatePairConfig,
        "compare a video with one that it ought to be like, such as an unquantized one",
    ),
    "evaluate dataset": (EvaluateDatasetConfig, "make a video of each of a dataset's captions, and judge them"),
    "doctor": (DoctorConfig, "what this machine can run, and what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Bad input is one line on stderr and exit code 2."""
    given = vars(_parser().parse_args(_joined(sys.argv[1:] if argv is None else argv)))
    command = given.pop("command")
    # Read when torch is loaded, here and in the worker process. By default OpenMP's threads spin for milliseconds after
    # every operation: beside any other job they spin on the core that the last of them waits for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from inferix_kernels._printing import while_read  # brings torch, for which --help need not wait

    return while_read(lambda: _run(command, given))


def _joined(words: Sequence[str]) -> list[str]:
    """A command of two words, as `evaluate pair`, as one."""
    two = " ".join(words[:2])
    return [two, *words[2:]] if two in COMMANDS else list(words)


def _run(command: str, given: dict[str, Any]) -> int:
    options = COMMANDS[command][0]

    def fail(text: str, code: int) -> int:
        say(f"inferix {command}", text)
        return code

    module = command.replace("-", "_").replace(" ", "_")
    try:
        return int(importlib.import_module(f".{module}", __package__).run(options(**given)))
    except ValueError as error:
        return fail(as_typed(str(error), options), USAGE)
    except ImportError as error:
        from inferix_kernels._install import explained

        return fail(as_typed(explained(error), options), USAGE)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except Exception as error:
        from inferix_kernels.distributed import PeerLost

        # Of several processes one says why they end, in a line; a mistake of ours is traced on rank 0.
        lost = isinstance(error, PeerLost)
        if not (lost or launched_rank()):
            raise
        return fail(str(error) if lost else f"{type(error).__name__}: {error}", FAILED)


def as_typed(text: str, options: type[Options]) -> str:
    """A message with the options as they are typed.

    A message of this project begins with the arguments it is about, `seconds must be ...` or `host, port: ...`, and
    puts others that it mentions between backquotes.
    """
    typed = {each.name: _typed(each.name) for each in declared(options) if not each.option.positional}
    text = re.sub(r"`(\w+)`", lambda match: typed.get(match[1], match[0]), text)
    head = re.match(r"\w+(?:, \w+)*(?=:| must )", text)
    names = head[0].split(", ") if head else []
    if head is None or not typed.keys() >= set(names):
        return text
    return ", ".join(typed[name] for name in names) + text[head.end() :]


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as the commands themselves do."""

    def error(self, message: str) -> NoReturn:
        say(self.prog, f"{message} (options: {self.prog} --help)")
        self.exit(USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="inferix", description="Run and steer block-diffusion video world models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (options, help) in COMMANDS.items():
        described = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        _add_options(described, declared(options))
    return parser


def _add_options(parser: argparse.ArgumentParser, options: Sequence[Declared]) -> None:
    """What is not given is left to the dataclass; options instead of each other share a group."""
    replaced = {each.option.instead_of for each in options if each.option.instead_of}
    groups = {name: parser.add_mutually_exclusive_group() for name in replaced}
    for each in options:
        group = groups.get(each.option.instead_of or each.name, parser)
        if each.option.positional:
            group.add_argument(each.name, **_settings(each))
        else:
            names = [_typed(name) for name in (each.name, *each.option.other_names)]
            group.add_argument(*names, dest=each.name, default=argparse.SUPPRESS, **_settings(each))


def _settings(each: Declared) -> dict[str, Any]:
    """The keyword arguments of `add_argument` for an option."""
    option, kind = each.option, KINDS[each.type]
    default = f"{each.default:g}" if isinstance(each.default, float) else each.default
    shown = isinstance(default, (int, str)) and not isinstance(default, bool)
    help = f"{option.help} (default: {default})" if shown else option.help
    if kind.parse is None:
        return {"help": help, "action": "store_true"}
    parse = option.parse or kind.parse
    settings: dict[str, Any] = {"help": help, "type": parse if isinstance(parse, type) else _explained(parse)}
    if each.type == Sequence[str] and option.parse is None:
        settings |= {"nargs": "+"} if option.positional else {"action": "append"}
    more = {"choices": option.choices, "metavar": option.metavar}
    return settings | {name: value for name, value in more.items() if value}


def _explained(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse`, whose errors argparse shows as they are."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
