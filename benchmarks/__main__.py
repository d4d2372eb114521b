"""`python -m benchmarks`: one command for each benchmark."""

import sys
from collections.abc import Sequence

from benchmarks import (
    autoencoder,
    compare,
    convolutions,
    costs,
    imports,
    losses,
    low_precision,
    memory,
    multihost,
    pinn,
    precision,
    preconditioners,
    product,
    restart,
    rnn,
    scaling,
    shares,
)
from benchmarks.options import Parser

_COMMANDS = {
    "autoencoder": autoencoder,
    "compare": compare,
    "pinn": pinn,
    "product": product,
    "losses": losses,
    "convolutions": convolutions,
    "shares": shares,
    "costs": costs,
    "precision": precision,
    "low_precision": low_precision,
    "preconditioners": preconditioners,
    "memory": memory,
    "rnn": rnn,
    "restart": restart,
    "multihost": multihost,
    "scaling": scaling,
    "imports": imports,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark.

    Args:
      argv: the command line; `None` is that of the process.

    Returns:
      The exit status.
    """
    parser = Parser(prog="python -m benchmarks", description="Benchmarks of hfjax.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in _COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
    args = parser.parse_args(argv)
    return _COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
