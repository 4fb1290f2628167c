"""Images that look the same: a perceptual hash, and which hashes nearly agree."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bcnn.utils.console import track

SIDE = 32  # px, of the small image that is hashed
COSINES = np.cos(np.pi / SIDE * np.outer(np.arange(8), np.arange(SIDE) + 0.5))
# Least median of the amplitudes, where a cosine of one grey level has 256, photographs 340 or more.
# Below it rounding decides the bits, and plain areas, ramps and horizons would look the same.
FAINT = 32
# Bits of 63 in which hashes of near duplicates differ at most. Of flowers17's 272 test images 22 have
# a near duplicate in training, the same photograph each; of 2,485 groceries and 200 butterflies none;
# of 2,714 cars 15, of which 7 are other cars. All 7,381 images of the first three sets are recognised
# after they were saved again (JPEG of quality 60, PNG, WebP, 0.9 of the size).
NEAR = 6
PAIRS = 1 << 23  # hashes compared at a time, in 64 MB

Hashes = Mapping[str, int | None]  # by name of an image; None looks like no other


def perceptual_hash(small: Image.Image) -> int | None:
    """Return whether each of the lowest frequencies but the mean is above their median ("pHash").

    None: the image, of `SIDE` × `SIDE` px, is too nearly flat. Zauner, "Implementation and benchmarking
    of perceptual image hash functions", 2010, §3.2.1.
    """
    low = (COSINES @ np.asarray(small.convert("L"), np.float32) @ COSINES.T).ravel()[1:]
    low -= np.median(low)
    if np.median(np.abs(low)) < FAINT:
        return None
    return int.from_bytes(np.packbits(low > 0).tobytes(), "big")


def near_duplicates(hashes: Hashes, others: Hashes) -> dict[str, str]:
    """Return of each image the other one of the nearest hash, if at most `NEAR` bits differ."""
    found: dict[str, str] = {}
    for block, candidates, distances in _distances(hashes, others):
        nearest = distances.argmin(axis=1)
        near = distances[range(len(block)), nearest] <= NEAR
        found |= {block[i]: candidates[nearest[i]] for i in near.nonzero()[0]}
    return found


def look_alike_groups(hashes: Hashes) -> dict[str, str]:
    """Return of each image the first one of its group: in a group, hashes differ step by step in at
    most `NEAR` bits.
    """
    from scipy.sparse import coo_array  # here, since prediction needs no scipy
    from scipy.sparse.csgraph import connected_components

    names = [name for name in hashes if hashes[name] is not None]
    first, done = np.arange(len(names)), 0  # of each image, the first one of its group so far
    for block, _, distances in _distances(hashes, hashes):
        near = np.nonzero(distances <= NEAR)
        ends = [near[0] + done, np.arange(len(names))], [near[1], first]
        rows, columns = map(np.concatenate, ends)
        edges = coo_array((np.ones(len(rows), bool), (rows, columns)), (len(names), len(names)))
        labels = connected_components(edges, directed=False)[1]
        first = np.unique(labels, return_index=True)[1][labels]
        done += len(block)
    return {name: names[k] for name, k in zip(names, first.tolist(), strict=True)}


def _distances(
    hashes: Hashes, others: Hashes
) -> Iterator[tuple[list[str], list[str], NDArray[np.uint8]]]:
    """Yield some names of `hashes`, all of `others`, and the numbers of bits that differ."""
    names, candidates = ([name for name in each if each[name] is not None] for each in (hashes, others))
    if not names or not candidates:
        return
    compared = np.array([others[name] for name in candidates], np.uint64)
    size = max(1, PAIRS // len(candidates))
    for start in track(range(0, len(names), size), "comparing images", unit="blocks"):
        block = names[start : start + size]
        bits = np.array([hashes[name] for name in block], np.uint64)
        yield block, candidates, np.bitwise_count(bits[:, None] ^ compared)
