"""Checkpoints that can be resumed exactly.

`files.py` writes and reads them: what counts as damage is decided in its `check`, and named there. `configuration.py`
says what a run that goes on must have in common with the one before, `trainer.py` puts both into the Trainer,
`signals.py` stops it.
"""
