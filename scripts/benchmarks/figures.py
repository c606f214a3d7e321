"""Figures of the documentation: drawn without a screen, and written as small files that differ only if they must."""

import re
from pathlib import Path


STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "hnml_hf",  # the same names of parts in every run
    "font.sans-serif": ["DejaVu Sans"],
    "font.family": ["sans-serif"],
}


def drawing():
    """matplotlib's `pyplot`, or the end with what to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install 'hnml_hf[benchmark]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: str | Path):
    """Write a figure of matplotlib; an SVG file without its date, and to a tenth of a point."""
    path = Path(path)
    if path.suffix != ".svg":
        figure.savefig(path)
        return
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure.savefig(path, metadata={"Date": None})
    path.write_text(rounded(path.read_text(encoding="utf-8")), encoding="utf-8")


def rounded(svg: str) -> str:
    """An SVG text with coordinates of one decimal, one font for all of it, and no names that nothing refers to."""

    def shorter(number: re.Match) -> str:
        return f"{round(float(number[0]), 1) + 0:g}"  # + 0: no -0

    def coordinates(found: re.Match) -> str:
        return re.sub(r"\s*\n\s*", " ", re.sub(r"-?\d+\.\d+", shorter, found[0]))

    svg = re.sub(r' (?:d|x|y)="[^"]*"|(?:translate|rotate)\([^)]*\)', coordinates, svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|(?<=<g) id="[^"]*"| font-family: [^;"]*;?', "", svg)
    svg = svg.replace("<svg ", '<svg font-family="DejaVu Sans, sans-serif" ', 1)
    return re.sub(r"\n\s+", "\n", svg)
