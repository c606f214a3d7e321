"""Which labels are wrong: scores, evidence, a report, exports and a cleaned dataset.

Without training: `features.py`, then `judge.py`, put together in `issues.py`. After training: `dynamics.py` keeps what
was seen of each sample, `noise_model.py` estimates the noise from that, `table.py` has a row per sample;
`single_pass.py` does so for any classifier. A new column belongs in `issue_table` of `issues.py`, or `noise_scores` of
`table.py`. From either table: `gallery.py` and `report/` (pictures), `review/` (annotations), `cleaning.py` and
`outputs.py` (a corrected dataset), `export.py`, and `exchange.py`, which writes and reads the files of annotation
tools. `run.py` audits a finished run.
"""
