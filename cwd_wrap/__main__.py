"""Commands: `python -m cwd_wrap env` prints what a bug report needs."""

import argparse

from cwd_wrap import env


def main() -> None:
    """Run the given command; without one, print the help."""
    parser = argparse.ArgumentParser(prog="python -m cwd_wrap")
    commands = parser.add_subparsers(dest="command", title="commands")
    of_env = commands.add_parser("env", help="print versions, devices, backends and paths, for bug reports")
    of_env.add_argument("--optimizers", action="store_true", help="list the path of each installed optimizer class")
    arguments = parser.parse_args()
    if arguments.command is None:
        parser.print_help()
    else:
        print(env.report(optimizers=arguments.optimizers))


if __name__ == "__main__":
    main()
