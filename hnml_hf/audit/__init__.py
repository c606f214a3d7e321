"""Which labels are wrong: scores, evidence, a report, exports and a cleaned dataset.

Without training: `features.py`, then `judge.py`, put together in `issues.py`. After training: `noise_model.py`
estimates the noise from the training dynamics, `table.py` has a row per sample; `single_pass.py` does so for any
classifier. From either table: `gallery.py` and `report/` (pictures), `review/` (annotations), `cleaning.py` and
`export.py`.
"""
