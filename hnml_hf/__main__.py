"""The scripts of this project by name, where there is no source tree.

    hnml train --recipe quickstart
    accelerate launch -m hnml_hf train --recipe quickstart

A wheel has the folder `scripts/` as `hnml_hf/scripts/`; in a source tree it lies beside the package.
"""

import ast
import runpy
import sys
from pathlib import Path


COMMANDS = ("train", "probe", "evaluate", "predict", "audit", "audit_data", "export")


def scripts_folder() -> Path:
    package = Path(__file__).parent
    installed = package / "scripts"
    return installed if installed.is_dir() else package.parent / "scripts"


def usage() -> str:
    lines = ["usage: hnml COMMAND [options]", ""]
    for command in COMMANDS:
        source = (scripts_folder() / f"{command}.py").read_text(encoding="utf-8")
        lines.append(f"  {command:<12}{ast.get_docstring(ast.parse(source)).splitlines()[0]}")
    return "\n".join([*lines, "", "`hnml COMMAND --help` lists the options of one."])


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(usage())
        return
    if command not in COMMANDS:
        raise SystemExit(f"hnml: `{command}` is none of its commands.\n{usage()}")
    folder = scripts_folder()
    del sys.argv[1]
    sys.path.insert(0, str(folder))  # scripts import their neighbours
    runpy.run_path(str(folder / f"{command}.py"), run_name="__main__")


if __name__ == "__main__":
    main()
