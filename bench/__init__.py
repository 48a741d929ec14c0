"""Measurements on a GPU at the model's real widths: `python -m bench.train_step --help`."""
