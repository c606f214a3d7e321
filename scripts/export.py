"""Write a trained model as one file for other runtimes, or publish it on the Hub.

    python scripts/export.py outputs/quickstart --output quickstart.onnx --with_cams
    python scripts/export.py outputs/quickstart --output quickstart.pt2
    python scripts/export.py outputs/quickstart --hub_model_id user/name

A file is checked: it must compute what the model computes. A new repository on the Hub is private; weights,
configuration, card and pictures are uploaded, and nothing else of the folder.
"""

import argparse
from pathlib import Path

import transformers
from options import command_words, load_model, plain_errors

from hnml_hf import export_to_onnx, push_to_hub
from hnml_hf.cli import HelpFormatter, refuse_too_little
from hnml_hf.hub.onnx_export import export_program


@plain_errors()
def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("model", help="A folder that training wrote, or a repository on the Hub.")
    parser.add_argument("--revision", default="main", help="Commit or branch of the repository.")
    parser.add_argument("--output", type=Path, help="File: .onnx, or .pt2 for torch.export.")
    parser.add_argument("--with_cams", action="store_true", help="Also give the map of the predicted class.")
    parser.add_argument("--hub_model_id", help="Publish the folder under this name on the Hub.")
    options = parser.parse_args(command_words(argv))
    refuse_too_little(parser, "export", options)
    if options.output and options.output.suffix not in (".onnx", ".pt2"):
        parser.error(f"--output {options.output}: the name must end in .onnx or .pt2")
    transformers.utils.logging.disable_progress_bar()
    if options.output:
        write(options)
    if options.hub_model_id:
        print(f"Published: {push_to_hub(options.model, options.hub_model_id).repo_url}")


def write(options: argparse.Namespace):
    """The model as one file, and what was written."""
    model = load_model(options).eval()
    export = export_to_onnx if options.output.suffix == ".onnx" else export_program
    path = export(model, options.output, with_cams=options.with_cams)
    files = [file for file in (path, path.with_name(f"{path.name}.data")) if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(f"{' and '.join(map(str, files))}: {size / 1e6:.1f} MB, checked against the model")


if __name__ == "__main__":
    main()
