"""Datasets with noisy labels, all with the features `image`, `label`, `clean_label` and `index` (the sample id).

Read `schema.py`, then `load.py`; `published/` has the loaders of known datasets, `custom/` those of your own files,
`checks/` what finds bad files and rows. From a dataset to batches: `transforms.py`, then `collate.py`.
"""
