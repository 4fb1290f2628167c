"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """A mistake in what was asked for: one sentence that names the file or option and the way out.

    `train.py` and the `python -m bcnn.*` commands print it without a traceback and exit with code 1.
    """
