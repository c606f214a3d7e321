"""Datasets of the literature, a file each. To add one, subclass the builder of `builder.py`, as `quickstart.py` does,
and name it in `BUILDERS` of `../load.py` (docs/extending.md)."""
