"""`rlhf completion`: a script that completes commands, options and files in a shell."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from rlhfdsl.cli.common import OK

HELP = "print a completion script for bash, zsh or fish"

_HOW = {
    "bash": "eval \"$(rlhf completion bash)\" in ~/.bashrc",
    "zsh": "eval \"$(rlhf completion zsh)\" in ~/.zshrc, after compinit",
    "fish": "rlhf completion fish > ~/.config/fish/completions/rlhf.fish",
}


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command: its names, its help, the words that it takes (None: no value)."""

    names: tuple[str, ...]
    help: str
    takes: tuple[str, ...] | None


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rlhf completion`."""
    parser.add_argument("shell", choices=tuple(_HOW), help="; ".join(f"{k}: {v}" for k, v in _HOW.items()))


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from rlhfdsl.cli import main

    commands: dict[str, tuple[str, list[Option]]] = {}
    for verb in main.available():
        module = main.module_of(verb)
        parser = argparse.ArgumentParser(prog=verb)
        module.configure(parser)
        commands[verb] = (module.HELP, _options(parser))
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell](commands), end="")
    return OK


def _options(parser: argparse.ArgumentParser) -> list[Option]:
    options = []
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            takes = None if action.nargs == 0 else tuple(map(str, action.choices or ()))
            help = (action.help or "").replace("%(prog)s", parser.prog)
            options.append(Option(tuple(action.option_strings), help, takes))
    return options


Commands = dict[str, tuple[str, list[Option]]]


def _bash(commands: Commands) -> str:
    cases = []
    for verb, (_, options) in commands.items():
        for option in options:
            if option.takes:
                names = "|".join(f"{verb}:{name}" for name in option.names)
                cases.append(f'    {names}) COMPREPLY=($(compgen -W "{" ".join(option.takes)}" -- "$word")); return ;;')
    words = []
    for verb, (_, options) in commands.items():
        names = " ".join(name for option in options for name in option.names)
        words.append(f'    {verb}) words="{names}" ;;')
    return "\n".join(
        [
            "_rlhf() {",
            '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
            '  if [ "$COMP_CWORD" -eq 1 ]; then',
            f'    COMPREPLY=($(compgen -W "{" ".join(commands)}" -- "$word")); return',
            "  fi",
            '  case "${COMP_WORDS[1]}:$before" in',
            *cases,
            "  esac",
            '  case "${COMP_WORDS[1]}" in',
            *words,
            "  esac",
            '  if [[ "$word" == -* ]]; then',
            '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
            "  else",
            '    COMPREPLY=($(compgen -f -X "!*.rlhf" -- "$word") $(compgen -d -S / -- "$word"))',
            "  fi",
            "}",
            "complete -o filenames -o nospace -F _rlhf rlhf",
            "",
        ]
    )


def _zsh(commands: Commands) -> str:
    lines = ["#compdef rlhf", "_rlhf() {", "  if (( CURRENT == 2 )); then", "    local -a verbs=("]
    lines += [f"      {_quoted(f'{verb}:{help}')}" for verb, (help, _) in commands.items()]
    lines += ["    )", "    _describe command verbs; return", "  fi", "  case $words[2] in"]
    for verb, (_, options) in commands.items():
        lines.append(f"    {verb}) _arguments \\")
        for option in options:
            help = option.help.replace("[", "(").replace("]", ")")
            takes = "" if option.takes is None else f":value:({' '.join(option.takes)})"
            for name in option.names:
                lines.append(f"      {_quoted(f'*{name}[{help}]{takes}')} \\")
        lines.append("      '*:recipe:_files -g \"*.rlhf\"' ;;")
    return "\n".join([*lines, "  esac", "}", "compdef _rlhf rlhf", ""])


def _fish(commands: Commands) -> str:
    lines = ["complete -c rlhf -f"]
    for verb, (help, options) in commands.items():
        lines.append(f"complete -c rlhf -n __fish_use_subcommand -a {verb} -d {_quoted(help)}")
        seen = f"'__fish_seen_subcommand_from {verb}'"
        for option in options:
            names = " ".join(f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
            takes = "" if option.takes is None else f" -x -a '{' '.join(option.takes)}'" if option.takes else " -r"
            lines.append(f"complete -c rlhf -n {seen} {names}{takes} -d {_quoted(option.help)}")
        lines.append(f"complete -c rlhf -n {seen} -k -a '(__fish_complete_suffix .rlhf)'")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
