from bcnn.utils.errors import Interruption, raise_interruptions  # noqa: F401  # alias: removed at the merge
