"""What disks and strangers do to files, drawn at random; and how much an answer may take."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hypothesis import settings
from hypothesis import strategies as st

Damage = Callable[[bytes], bytes]

FEW = settings(max_examples=settings.default.max_examples // 5)  # of what is dear, or of many kinds


@contextmanager
def bounded() -> Iterator[None]:
    """Takes at most 20 s (on a machine with other work), and 3 GB more than the process had."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 3_000_000


@st.composite
def damage(draw: st.DrawFn) -> Damage:
    """What disks and strangers do to a file: bytes replaced by others, more or fewer, or cut off."""
    lengths = st.sampled_from([0, 1, 4, 100, 10**9])
    edits = draw(st.lists(st.tuples(st.floats(0, 1), lengths, st.binary()), min_size=1))

    def apply(content: bytes) -> bytes:
        for place, length, new in edits:
            at = int(place * len(content))
            content = content[:at] + new + content[at + length :]
        return content

    return apply


def mutated(contents: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of the contents, damaged."""
    return st.builds(lambda apply, content: apply(content), damage(), st.sampled_from(contents))


def junk() -> st.SearchStrategy:
    """Values that a JSON file or a pickle of numbers and texts may hold."""
    numbers = st.sampled_from([0, -1, 1, 4, 32, 3.0, 10**9, 2**63, 10**40, 1e-9, 1e300])
    texts = st.sampled_from(["", "keep", "squash", "vgg16", "tiny", "bilinear", "plain", "../x", "0"])
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | numbers | texts
    keys = st.text() | st.sampled_from(["name", "size", "channels", "root", "train", "recipe"])
    return st.recursive(plain, lambda v: st.lists(v) | st.dictionaries(keys, v), max_leaves=8)
