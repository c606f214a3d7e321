"""The Trainer and its parts. Read `trainer.py` first, one step from batch to loss, and `step.py`, what it calls; then
`callbacks.py`, what goes on around steps; `args.py`, the options; and `resume/`, how a run goes on."""
