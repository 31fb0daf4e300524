"""The command line: a click group that loads each command's module only when it is called."""

from __future__ import annotations

import difflib
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from ondevice import __version__
from ondevice.errors import OndeviceError

COMMANDS = {
    "chat": ("ondevice_chat.command:chat", "Talk with a model in the terminal."),
    "generate": ("ondevice.commands.generate:generate", "Answer one prompt, or several as a batch."),
    "pull": ("ondevice.commands.store:pull", "Fetch a model into the local store."),
    "ls": ("ondevice.commands.store:ls", "List the models in the store."),
    "show": ("ondevice.commands.store:show", "Say what a model is: sizes, types, licence."),
    "rm": ("ondevice.commands.store:rm", "Delete a model from the store."),
    "convert": ("ondevice_convert.command:convert", "Convert a model: other bits, or made to skip work."),
    "eval": (
        "ondevice_eval.command:evaluate",
        "Measure perplexity, and KL against another model or backend.",
    ),
    "bench": ("ondevice_bench.command:bench", "Measure tokens per second and bytes moved."),
    "doctor": ("ondevice.commands.doctor:doctor", "Say what this machine offers and what will be used."),
}
"""Name -> where the command is, and its line of help, which must not cost an import."""

INTERRUPTED = 130
GARBAGE_AFTER = 50_000
"""Objects that Python makes between two looks for garbage; its own 700 would be reached a thousand times at a start."""


class Cli(click.Group):
    """The group. Errors end in one red line on stderr and an exit code, never in a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports a command's module and returns the command."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Finds the command, or names the one that was probably meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Commands: {', '.join(COMMANDS)}."
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Lists the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Runs the command line and exits: 0 done, 1 error or reader gone, 2 wrong usage, 130 interrupted."""
        extra = {"auto_envvar_prefix": "ONDEVICE", **extra, "standalone_mode": False}
        try:
            code = super().main(args, prog_name or "ondevice", **extra)
            sys.stdout.flush()
        except click.ClickException as e:
            e.show()
            sys.exit(e.exit_code)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        except OndeviceError as e:
            _complain(str(e))
        except MemoryError as e:
            _complain(f"not enough memory{f': {e}' if str(e) else ''}; try a smaller model or a smaller --context")
        except BrokenPipeError:
            # Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> NoReturn:
    color = False if os.environ.get("NO_COLOR") else None
    click.secho(f"error: {message}", fg="red", err=True, color=color)
    sys.exit(1)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="ONDEVICE_HOME moves the store; every option has a twin such as ONDEVICE_GENERATE_MAX_TOKENS.",
)
@click.version_option(__version__, package_name="ondevice", allow_from_autoenv=False)
def cli() -> None:
    """Language models on your own machine."""


def main() -> NoReturn:
    """Entry point of `ondevice`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # An answer may hold characters that the terminal's encoding lacks.
            stream.reconfigure(errors="replace")
    # What is imported and loaded stays: looking through all of it for garbage takes a tenth of a start, and once more
    # at the end.
    gc.set_threshold(GARBAGE_AFTER)
    try:
        cli.main()
    finally:
        gc.freeze()
