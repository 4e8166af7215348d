"""The command line: ``python -m sm12x <command>``.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> exit code``, imported only when it
is called for, so that no command pays for, or fails with, the imports of another.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from sm12x import __version__
from sm12x.errors import CubinError, CudaError

COMMANDS = {
    "demo": "run an FP8 expert layer from a checkpoint's files and check it against float64",
    "kernels": "list every precompiled kernel and its resources",
    "doctor": "say what keeps this machine from using the kernels, and what to do",
    "verify": "check the hashes of all cubins, and re-assemble them where a ptxas is at hand",
    "validate": "run every kernel on this GPU against the reference and write a report",
    "bench": "time the grouped GEMM on shapes of real models",
    "emulate": "run a kernel's PTX on the CPU, instruction by instruction",
}


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser with all command names, and the arguments of `command` alone."""
    parser = argparse.ArgumentParser(
        prog="python -m sm12x",
        description="Precompiled low-precision grouped GEMM kernels for SM120 and SM121.",
    )
    parser.add_argument("--version", action="version", version=f"sm12x {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name == command:
            importlib.import_module(f"sm12x.cli.{name}").add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 the command found or met something wrong, 2 bad
    usage."""
    argv = sys.argv[1:] if argv is None else argv
    # The first word that is no option names the command; the top level has no options that take a value.
    command = next((word for word in argv if not word.startswith("-")), None)
    args = build_parser(command).parse_args(argv)
    try:
        code: int = importlib.import_module(f"sm12x.cli.{args.command}").run(args)
        sys.stdout.flush()
    except (CudaError, CubinError) as error:
        print(f"sm12x {args.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
        return 1
    return code
