"""SIGTERM and SIGINT as a wish to stop: remembered until the trainer has finished its step, else followed at once."""

import os
import signal
import threading
import time


PATIENCE = 1.0  # seconds; a signal that comes sooner after the first is its echo: launchers and shells send it twice
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, start me again


class TrainingInterrupted(RuntimeError):
    """Training was asked to stop and saved a checkpoint. `scripts/train.py` ends with code 75.

    Example:

        try:
            trainer.train(resume_from_checkpoint="auto")
        except TrainingInterrupted:
            raise SystemExit(75) from None  # the scheduler starts the job again
    """


class StopSignals:
    """While it is entered, the first SIGTERM or SIGINT is kept in `received`, and the second one ends at once.

    Outside the main thread Python allows no handlers, and signals do what they did before.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self):
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _take(self, number, frame):
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class EndAtOnce(StopSignals):
    """While it is entered, the first SIGTERM or SIGINT ends the program with `EXIT_CODE`, as `SystemExit`.

    For what comes before and after training, where nothing is to be saved: resumed, it is done again.
    """

    def _take(self, number, frame):
        first = self.received is None
        super()._take(number, frame)
        if first:
            name = signal.Signals(number).name
            text = f"{name}: stopped. The same command with `--resume_from_checkpoint auto` goes on.\n"
            os.write(2, text.encode())  # `print` may be what was interrupted
            raise SystemExit(EXIT_CODE)
