"""`python -m benchmarks`: one command for each benchmark."""

import sys
from collections.abc import Sequence

from benchmarks import batches, compare
from benchmarks.cli import Parser, RefusedError
from benchmarks.micro import (
    accelerator,
    constants,
    costs,
    figures,
    least_squares,
    precision,
    preconditioners,
    product,
    rows,
    tpu,
)

_COMMANDS = {
    "compare": compare,
    "batches": batches,
    "product": product,
    "costs": costs,
    "preconditioners": preconditioners,
    "precision": precision,
    "constants": constants,
    "least_squares": least_squares,
    "rows": rows,
    "tpu": tpu,
    "accelerator": accelerator,
    "figures": figures,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark."""
    parser = Parser(prog="python -m benchmarks", description="Benchmarks of hfjax.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return _COMMANDS[args.command].run(args)
    except RefusedError as why:
        print(f"{parser.prog} {args.command}: {why}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
