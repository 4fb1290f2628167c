"""The one exception that is meant for the person at the keyboard."""

from bcnn.utils.terminal import printable


class UserError(Exception):
    """A mistake in what was asked for: one sentence that names the file or option and the way out.

    The commands print it without a traceback and exit with code 1.
    """

    def __str__(self) -> str:
        # From a data-loading worker it comes with that process's traceback before the sentence.
        sentence = super().__str__().rpartition("bcnn.utils.errors.UserError: ")[2]
        return printable(sentence.strip())
