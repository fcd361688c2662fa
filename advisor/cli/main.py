"""Starts the command that was asked for and turns every outcome into text and an exit code.

Goes in: the command line. Comes out: the command's output; an error as two lines on standard error, or as
the JSON envelope `ftadvisor.error/1` on standard output under --json. Never does: load what a command needs.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import warnings
from typing import Any

import click

from advisor import __version__
from advisor.errors import AdvisorError, MissingPackageError, UnknownNameError, UsageError
from advisor.units import printable

COMMANDS = {
    "demo": "The whole way on the embedded model: plan, train, export, verify, chat.",
    "wizard": "Answer a few questions, see the plan and its reasons, start it.",
    "plan": "Recommend a method for your data and machine and write a run folder.",
    "run": "Train a planned run; --resume continues exactly where it stopped.",
    "export": "Write a run or a model folder as GGUF, merged weights or a Modelfile.",
    "verify": "Prove that a GGUF file answers as the trained model does.",
    "chat": "Talk to a GGUF file, offline.",
    "serve": "Answer programs over the OpenAI interface, on this machine alone.",
    "probe": "Show what this machine has: accelerators, memory, cores, disk.",
    "inspect": "Show what a dataset holds and what is wrong with it.",
    "estimate": "Predict the memory and time of a training step.",
    "explain": "Explain a method, a setting, a warning or a term, with sources.",
    "doctor": "Check that everything needed is installed and works.",
    "runs": "List the run folders below a folder, or show one.",
}

INTERRUPTED = 130
"""Exit code."""
EXTRA_OF = {
    **dict.fromkeys(
        ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "accelerate", "pyarrow"), "train"
    ),
    **dict.fromkeys(("gguf", "llama_cpp", "numpy", "safetensors"), "gguf"),
    **dict.fromkeys(("uvicorn", "fastapi", "starlette"), "serve"),
}
"""Package -> the extra that brings it."""


class LazyGroup(click.Group):
    """Knows its commands by name and imports a command's module only to run it or to show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the command names in the order of the usual way."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        """Import `advisor.cli.<name>` and return its command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"advisor.cli.{cmd_name}")
        return getattr(module, cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Name the nearest command when the given one does not exist."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise UnknownNameError("command", args[0], COMMANDS, "ftadvisor --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their one-line help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    help="From your GPU and your data to a verified model file that runs offline.",
    epilog="Start with `ftadvisor demo` or `ftadvisor wizard`. Exit codes: 0 done, 1 failed, 2 usage, "
    "3 refused (does not fit, or must not be done as asked), 130 interrupted. "
    "Add --debug to any command for a traceback.",
)
@click.version_option(__version__, prog_name="ftadvisor", message="%(prog)s %(version)s")
def app() -> None:
    """Root of the commands."""


def _report(message: str, remedy: str, code: str, *, as_json: bool) -> None:
    if as_json:
        envelope = {
            "schema": "ftadvisor.error/1",
            "ok": False,
            "code": code,
            "message": message,
            "remedy": remedy,
        }
        print(json.dumps(envelope, ensure_ascii=False))
        return
    print(f"Error: {printable(message)}", file=sys.stderr)
    if remedy:
        print(f"Next:  {printable(remedy)}", file=sys.stderr)


def _require_text(argument: str) -> None:
    try:
        argument.encode()
    except UnicodeEncodeError as problem:
        raise UsageError(
            f"The argument {argument!r} is not valid UTF-8.", "Write it in UTF-8; rename a file of that name."
        ) from problem


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: what followed `ftadvisor`; `--debug` may stand anywhere and asks for tracebacks.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    as_json = "--json" in arguments
    try:
        for argument in arguments:
            _require_text(argument)
        outcome = app.main(arguments or ["--help"], prog_name="ftadvisor", standalone_mode=False)
    except AdvisorError as error:
        if debug:
            raise
        _report(error.message, error.remedy, error.code, as_json=as_json)
        return error.exit_status
    except click.ClickException as error:
        command = f"ftadvisor {arguments[0]}" if arguments[:1] and arguments[0] in COMMANDS else "ftadvisor"
        _report(error.format_message(), f"{command} --help", "usage", as_json=as_json)
        return 2
    except (KeyboardInterrupt, click.Abort):
        _report("Interrupted.", "", "interrupted", as_json=as_json)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").partition(".")[0])
        if debug or extra is None:
            raise
        missing = MissingPackageError(error.name or "", extra)
        _report(missing.message, missing.remedy, missing.code, as_json=as_json)
        return missing.exit_status
    except Exception as error:  # the outermost boundary: no traceback reaches a person
        if debug:
            raise
        message = f"Something unexpected happened ({type(error).__name__}: {error})."
        _report(
            message,
            "This is a fault of ftadvisor; the same command with --debug shows where.",
            "internal",
            as_json=as_json,
        )
        return 1
    return outcome if isinstance(outcome, int) else 0


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(INTERRUPTED)


def main() -> None:
    """Entry point of the `ftadvisor` command.

    A process that is asked to end, or whose terminal is closed, takes half files and children along as at
    Ctrl-C. What is ignored stays so, under `nohup` for one; a training stage listens for itself.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    if not sys.warnoptions and "--debug" not in sys.argv:
        # What libraries tell programmers: names that will change, a package that would make it faster.
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.exit(run(sys.argv[1:]))
