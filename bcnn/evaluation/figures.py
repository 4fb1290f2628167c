"""alias: removed at the merge, with this file."""

from bcnn.evaluation.results import _write_classes, write_images  # noqa: F401
from bcnn.evaluation.results import csv_file as table  # noqa: F401
