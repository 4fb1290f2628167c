from bcnn.utils.environment import commit, software  # noqa: F401  # alias: removed at the merge
