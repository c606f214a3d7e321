"""Your own folders and tables: `load.py` picks the builder, `columns.py` says which column is what, `labels.py` makes
class ids of what stands there."""
