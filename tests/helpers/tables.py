"""Tables of images and labels, of every kind that people have."""

import json

from datasets import Dataset


def write_table(path, header, rows):
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        mark = "\t" if suffix == ".tsv" else ","
        quoted = [[f'"{cell}"' if "," in str(cell) else str(cell) for cell in row] for row in [header, *rows]]
        path.write_text("".join(mark.join(row) + "\n" for row in quoted))
    elif suffix == ".parquet":
        columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
        Dataset.from_dict(columns).to_parquet(path)
    else:
        records = [dict(zip(header, row, strict=True)) for row in rows]
        text = json.dumps(records) if suffix == ".json" else "".join(json.dumps(r) + "\n" for r in records)
        path.write_text(text)
