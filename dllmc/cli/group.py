"""What dllmc's commands have in common: help in sections, and mistakes told in one line.

Nothing here imports more than click, so that `dllmc --help` and shell completion answer at once.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from dllmc.errors import DllmcError

F = TypeVar("F", bound=Callable[..., None])

WRONG_USE, INTERRUPTED = 2, 130  # the latter as shells report SIGINT


class Option(click.Option):
    """An option that --help shows under a heading of its own."""

    def __init__(self, *args: Any, heading: str, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.heading = heading


class Command(click.Command):
    """A command whose --help lists the options under their headings, in the order in which they are declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "heading", "Other"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class Group(click.Group):
    """Commands that tell a mistake in one line and exit with 2, on Ctrl-C with 130, silently on a closed pipe with 1.

    Anything else that goes wrong is a bug and keeps its traceback.
    """

    command_class = Command

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
            sys.exit(code if isinstance(code, int) else 0)
        except click.Abort:
            _exit("interrupted", INTERRUPTED)
        except click.UsageError as error:
            hint = f" Try '{error.ctx.command_path} --help'." if error.ctx is not None else ""
            _exit(f"error: {error.format_message().rstrip('.')}.{hint}", WRONG_USE)
        except click.ClickException as error:
            _exit(f"error: {error.format_message()}", WRONG_USE)
        except DllmcError as error:
            _exit(f"error: {error}", WRONG_USE)
        except OSError as error:
            if error.errno is None:
                raise
            _exit(f"error: {error}", WRONG_USE)


def option(heading: str, *names: str, **attributes: Any) -> Callable[[F], F]:
    """`click.option`, under a heading."""
    return click.option(*names, cls=Option, heading=heading, **attributes)


def _exit(message: str, code: int) -> NoReturn:
    """Leave with a message, which is put on one line."""
    click.echo(" ".join(line.strip() for line in message.splitlines()), err=True)
    sys.exit(code)
