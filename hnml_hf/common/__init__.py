"""What every folder may use, and what uses no other: `atomic.py` (complete files), `finite.py` (values that are not
numbers are errors), `devices.py` and `values.py` (options that cannot be are errors), `answers.py` (whether the Hub
answers), `words.py` (numbers in sentences)."""
