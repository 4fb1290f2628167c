"""This project beside the original's plain loop, one file a part: `python -m benchmarks`."""
