"""Pack the model of a quickstart run as one file for a release: what a push to the Hub would upload, and its hash.

    python scripts/maintenance/release_asset.py outputs/quickstart --output quickstart-resnet10t.zip
    gh release upload v0.1.0 quickstart-resnet10t.zip quickstart-resnet10t.zip.sha256

The images of the quickstart are under the MIT license, so that weights trained on them may be passed on. Other
datasets have licenses of their own, and are refused. The same run gives the same bytes.
"""

import argparse
import hashlib
import json
import zipfile
from pathlib import Path

from hnml_hf.cli import HelpFormatter
from hnml_hf.common.atomic import atomic_write
from hnml_hf.hub.upload import published_files
from hnml_hf.modeling.saving import check_folder


MAY_BE_PASSED_ON = ("quickstart",)
EARLIEST = (1980, 1, 1, 0, 0, 0)  # that a zip file can write; no time of the run


def pack(run: Path, output: Path) -> str:
    """Write the published files of a run into a zip file, and its SHA-256 beside it in the form of `sha256sum`.

    Raises:
        ValueError: if there is no complete model, or its data may not be passed on.
    """
    folder, results = Path(check_folder(run)), run / "all_results.json"
    dataset = json.loads(results.read_text(encoding="utf-8")).get("dataset") if results.is_file() else None
    if dataset not in MAY_BE_PASSED_ON:
        raise ValueError(
            f"{run} was trained on {dataset or 'data that it does not name'}; weights are packed of runs on "
            f"{', '.join(MAY_BE_PASSED_ON)}, whose license allows it."
        )
    with atomic_write(output) as unfinished, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
        for name in published_files(folder):
            archive.writestr(zipfile.ZipInfo(f"{output.stem}/{name}", EARLIEST), (folder / name).read_bytes())
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    with atomic_write(Path(f"{output}.sha256")) as unfinished:
        unfinished.write_text(f"{digest}  {output.name}\n", encoding="utf-8")
    return digest


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="`output_dir` of a run on the quickstart.")
    parser.add_argument("--output", type=Path, required=True, help="Zip file to write.")
    options = parser.parse_args(argv)
    try:
        digest = pack(options.run, options.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")


if __name__ == "__main__":
    main()
