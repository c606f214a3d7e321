"""The commands of this project by name, where there is no source tree.

    hnml train --recipe quickstart
    accelerate launch -m hnml_hf train --recipe quickstart

A wheel has the folder `scripts/` as `hnml_hf/scripts/`; in a source tree it lies beside the package.
"""

import difflib
import importlib
import os
import signal
import sys

from . import __version__
from .cli import (
    COMMANDS,
    IN_SOURCES,
    RENAMED,
    answer_help,
    check_words,
    describe,
    quiet_pipes,
    script_of,
    scripts_folder,
)
from .common.collector import end_of_imports, start_of_imports


INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def commands() -> list[str]:
    return [*COMMANDS, *(command for command in IN_SOURCES if script_of(command).is_file())]


def usage() -> str:
    lines = ["usage: hnml COMMAND [options]", ""]
    lines += [f"  {command:<12}{describe(command).splitlines()[0]}" for command in commands()]
    return "\n".join(
        [*lines, "", "`hnml COMMAND --help` lists the options of one, `hnml --version` tells the version."]
    )


def _end_at_once(*_):
    """Ctrl-C while libraries are imported, when there is nothing to save."""
    os.write(sys.stderr.fileno(), b"hnml: interrupted\n")
    os._exit(INTERRUPTED)


@quiet_pipes()
def main():
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
        return
    if command == "--version":
        print(f"hnml {__version__}")
        return
    if command in RENAMED:
        raise SystemExit(f"hnml: `{command}` is now called `{RENAMED[command]}`.")
    if command in IN_SOURCES and command not in commands():
        raise SystemExit(f"hnml: `{command}` needs the source tree: clone the repository and call it there.")
    if command not in commands():
        close = difflib.get_close_matches(command, commands(), n=1)
        hint = f"Did you mean `{close[0]}`?" if close else f"There are {', '.join(commands())}."
        raise SystemExit(f"hnml: there is no command `{command}`. {hint}")
    if command in COMMANDS:  # a benchmark reads its own command line
        answer_help(command, words)
        check_words(command, words)

    sys.argv = [f"hnml {command}", *words]
    sys.path[:0] = [str(script_of(command).parent), str(scripts_folder())]  # scripts import their neighbors
    previous = signal.signal(signal.SIGINT, _end_at_once)
    start_of_imports()
    script = importlib.import_module(command)
    end_of_imports()
    signal.signal(signal.SIGINT, previous)
    try:
        sys.exit(script.main())
    except KeyboardInterrupt:
        print("hnml: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
