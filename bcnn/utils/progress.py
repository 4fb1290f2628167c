from bcnn.utils.console import Task, progress, span, track  # noqa: F401  # alias: removed at the merge
