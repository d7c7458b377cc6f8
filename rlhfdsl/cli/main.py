"""`rlhf VERB …`: one module for each verb, imported only when it is used."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TextIO

from rlhfdsl import __version__

VERBS = (
    *("init", "check", "fmt", "fix", "explain", "import"),
    *("plan", "graph", "diff", "lock", "run", "bundle", "verify", "cache"),
    *("chat", "serve", "report", "bench", "doctor", "schema", "completion", "lsp"),
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIRST_STEPS = """\
  rlhf init DIR          write a recipe to start from
  rlhf check FILE        every mistake, before a GPU is held
  rlhf plan FILE         steps, memory and files, before a GPU is held
  rlhf run FILE          run it; run it again to go on"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 ok, 1 an error of recipe or run, 2 usage or I/O, 3 a bug here, 130 interrupted;
    more of `rlhf run` in docs/resume.md."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = bool(os.environ.get("RLHF_DEBUG"))
    if "--debug" in arguments:
        arguments.remove("--debug")
        debug = True
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us (`>&-`): what is said goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    _speak(sys.stdout)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    try:
        try:
            return _dispatch(arguments)
        finally:
            sys.stdout.flush()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 2
    except KeyboardInterrupt:
        print("rlhf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop(sys.stdout)  # the reader (`| head`) is gone
        return 0
    except Exception as error:
        return _failed(error, arguments, debug)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_overview())
        return 0
    verb = arguments[0]
    if verb in ("-h", "--help"):
        print(_overview())
        return 0
    if verb in ("-V", "--version"):
        print(f"rlhf {__version__}")
        return 0
    if verb not in available():
        from rlhfdsl.language.suggest import nearest

        near = nearest(verb, available())
        help = f"did you mean `rlhf {near[0]}`?" if near else f"commands: {', '.join(available())}"
        print(f"rlhf: there is no command `{verb}`; {help}", file=sys.stderr)
        return 2
    module = module_of(verb)
    parser = argparse.ArgumentParser(prog=f"rlhf {verb}", description=module.HELP)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a bug")
    module.configure(parser)
    code = module.run(parser.parse_args(arguments[1:]))
    return int(code)


def module_of(verb: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"rlhfdsl.cli.{_file(verb)}")


def available() -> tuple[str, ...]:
    """The commands that are there."""
    return tuple(verb for verb in VERBS if importlib.util.find_spec(f"rlhfdsl.cli.{_file(verb)}"))


def _file(verb: str) -> str:
    return "import_" if verb == "import" else verb  # a keyword of Python


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<11} {module_of(verb).HELP}" for verb in available())
    return (
        f"rlhf {__version__}: RLHF recipes, checked, planned and run\n\nfirst steps\n{_FIRST_STEPS}\n\n"
        f"commands\n{verbs}\n\n`rlhf COMMAND --help` tells more about one."
    )


def _speak(stream: TextIO) -> None:
    """Recipes and JSON are UTF-8 whatever the locale says; a terminal that lacks a character is shown its number."""
    if isinstance(stream, io.TextIOWrapper):
        if stream.isatty():
            stream.reconfigure(errors="backslashreplace")
        else:
            stream.reconfigure(encoding="utf-8")


def _drop(stream: TextIO) -> None:
    """Send what a stream still holds nowhere: Python would complain once more when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _failed(error: Exception, arguments: Sequence[str], debug: bool) -> int:
    """What no command expected: a UserError or an I/O error is the user's to mend, the rest is a bug."""
    from rlhfdsl.language.diagnostics import UserError

    if isinstance(error, UserError):
        from rlhfdsl.cli.common import show_user_error

        return show_user_error(error)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        print(f"rlhf: {error.filename or 'cannot write'}: {error.strerror}", file=sys.stderr)
        if error.filename is None:
            _drop(sys.stdout)
        if not debug:
            return 2
    if debug:
        import traceback

        traceback.print_exception(error)
    first = str(error).partition("\n")[0]
    print(
        f"rlhf: this is a bug in rlhfdsl, not in your recipe\n"
        f"  what     {type(error).__name__}: {first}\n"
        f"  command  rlhf {' '.join(arguments)}\n"
        f"  version  rlhfdsl {__version__}, Python {sys.version.split()[0]}\n"
        f"  more     the same with --debug shows where it happened",
        file=sys.stderr,
    )
    return 3


if __name__ == "__main__":
    sys.exit(main())
