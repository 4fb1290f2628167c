"""Every image read and decoded once before training; the findings are cached until a file changes."""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from PIL import Image

from bcnn.data.image_files import listed
from bcnn.data.image_io import VERSION, decode, file_state, open_image, reason, upright_rgb
from bcnn.data.index import ImageIndex
from bcnn.data.lookalikes import SIDE, perceptual_hash
from bcnn.utils.console import logger, track
from bcnn.utils.environment import cores
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_write, cache_folder

CHUNK = 32  # images that a thread takes at a time


class Finding(NamedTuple):
    """What is known of an image file; of a broken one `error` alone."""

    format: str = ""  # Pillow's name
    width: int = 0  # px, as stored: before an EXIF rotation
    height: int = 0
    digest: str = ""  # of the file's bytes
    flat: bool = False  # all pixels have the same colour
    perceptual_hash: int | None = None  # 63 bits, nearly all shared by images that look the same
    error: str = ""


Findings = Mapping[str, Finding]  # by path


def check(source: Path, paths: Sequence[str]) -> dict[str, Finding]:
    """Return what is known of each image; those that are new, changed or were broken are read.

    Ranks that start together wait for the first and read its cache, named by the images' `source`.
    """
    cache = cache_file(source, ".json")
    with FileLock(cache.with_suffix(".lock")):
        cached = _read_cache(cache)
        entries = {path: cached.get(os.path.abspath(path)) for path in paths}
        states = {path: _state(path) for path in paths}
        known = {path: entry for path, entry in entries.items() if entry and entry[0] == states[path]}
        found = {path: Finding(*entry[1:]) for path, entry in known.items()}
        missing = [path for path in paths if path not in found]
        try:
            for result, path in zip(_inspect_all(missing), missing, strict=True):
                found[path] = result
                if not result.error:  # another version of Pillow may read a broken file
                    cached[os.path.abspath(path)] = [states[path], *result]
        finally:  # an interrupted check continues where it was
            if missing:
                with suppress(UserError), atomic_write(cache) as part:  # no room: checked again
                    part.write_text(json.dumps({"version": VERSION, "images": cached}))
    return {path: found[path] for path in paths}


def inspect(path: str) -> Finding:
    """Read a file once and decode it to its last byte.

    JPEGs are decoded at an eighth of their size (small ones at `SIDE` px or more): every coefficient is
    read, so that truncation shows, and most arithmetic is left out. An image of one colour is then
    decoded at 1,536 px or more.
    """
    try:
        file_state(path)  # raises at a pipe
        content = Path(path).read_bytes()
        with open_image(BytesIO(content)) as image:
            kind, (width, height) = str(image.format), image.size
            reduced = image.draft(None, (SIDE, SIDE))  # of a JPEG: mode, and box of the image
            pixels = decode(image, None)
        # Without the box, the last pixels of a reduced JPEG, which are partly empty, would stretch it.
        is_decoded = not image.tile  # or without its end marker, at full size
        whole, box = (image, reduced[1]) if reduced and is_decoded else (pixels, None)
        small = upright_rgb(whole.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box))
        if flat := bool(pixels.getcolors(1)):
            flat = bool(decode(open_image(BytesIO(content)), side=1024).getcolors(1))
        # 64 bits: two of a million images agree with a probability of 3e-8.
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        return Finding(kind, width, height, digest, flat, perceptual_hash(small))
    except Exception as error:  # decoders raise many types
        return Finding(error=reason(path, error))


def broken(findings: Findings) -> dict[str, str]:
    """Return the images that cannot be decoded, and why."""
    return {path: finding.error for path, finding in findings.items() if finding.error}


def without_broken(index: ImageIndex, findings: Findings, source: Path, skip: bool) -> ImageIndex:
    """Return the index without images that cannot be decoded; raise UserError unless `skip`.

    A file in the cache lists them, a line `path<TAB>reason` each.
    """
    if not (reasons := broken(findings)):
        return index
    lines = (f"{os.path.abspath(path)}\t{reason}\n" for path, reason in reasons.items())
    with atomic_write(file := cache_file(source, "-broken.txt")) as part:
        part.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    if not skip:
        examples = listed((f"{path} ({reason})" for path, reason in reasons.items()), 3)
        raise UserError(
            f"{len(reasons)} of {len(index.paths)} images cannot be decoded: {examples}; {file} lists "
            "them: repair or remove them, or leave them out with data.on_invalid_image=skip"
        )
    labels = Counter(label for path, label in index.samples if path in reasons)
    counts = listed(f"{index.classes[label]} {count}" for label, count in labels.most_common())
    logger.warning(f"left out {len(reasons)} images that cannot be decoded ({file}): {counts}")
    return index.without(reasons)


def cache_file(source: Path, suffix: str) -> Path:
    """Return the path of a file about `source` in the cache of checks."""
    absolute = os.path.abspath(source)
    key = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:8]
    return cache_folder("checks") / f"{os.path.basename(absolute)}-{key}{suffix}"


def _inspect_all(paths: Sequence[str]) -> Iterator[Finding]:
    """Yield the finding of each path; threads decode, as Pillow releases the interpreter's lock."""
    with ThreadPool(cores()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about files that it can read
        yield from track(pool.imap(inspect, paths, CHUNK), "checking images", len(paths))


def _state(path: str) -> list[int]:
    try:
        return [*file_state(path)]
    except OSError:  # `inspect` says why
        return []


def _read_cache(file: Path) -> dict[str, list[Any]]:
    """Return [state, *finding] by absolute path; nothing from a missing, damaged or older cache."""
    try:
        cached = json.loads(file.read_text())
        return dict(cached["images"]) if cached["version"] == VERSION else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
