"""This project beside the source's plain loop, one file a part: `python -m bcnn.benchmark`."""
