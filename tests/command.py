"""Commands run in this process."""

from rlhfdsl.cli.main import main


def rlhf(capsys, *arguments):
    """Exit code, stdout and stderr of a command in this process."""
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err
