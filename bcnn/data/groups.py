"""Groups of images that no split cuts: of one camera, plant or day, copies, and near duplicates."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from scipy.cluster.hierarchy import DisjointSet

from bcnn.data.image_files import find_images, is_image
from bcnn.data.index import ImageIndex
from bcnn.data.integrity import Findings
from bcnn.data.lists import read_rows
from bcnn.data.lookalikes import look_alike_groups
from bcnn.data.urls import beside
from bcnn.utils.errors import UserError


def match_groups(paths: Iterable[str], pattern: str, option: str, base: Path | None) -> dict[str, str]:
    """Return what a regular expression finds in each path, from `base`: its first group, or the match.

    Raise UserError, which names the `option`, where it finds nothing in a path.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option}={pattern} is no regular expression: {error}") from error
    names = {}
    for path in paths:
        found = expression.search(Path(os.path.relpath(path, base) if base else path).as_posix())
        names[path] = found[min(expression.groups, 1)] if found else None
    if missing := [path for path, name in names.items() if not name]:
        raise UserError(
            f"{option}={pattern} finds no group in {len(missing)} of {len(names)} paths, for example "
            f"{missing[0]}: choose an expression that matches a part of every path"
        )
    return {path: name or "" for path, name in names.items()}


def name_groups(index: ImageIndex, pattern: str | None, option: str, source: Path) -> ImageIndex:
    """Return the index with the groups that `match_groups` finds in paths from its folder or list."""
    if pattern is None:
        return index
    base = source.parent if source.is_file() else source
    return replace(index, groups=match_groups(index.paths, pattern, option, base))


def find_groups(images: Sequence[str], pattern: str | None) -> dict[str, list[str]]:
    """Return the paths of each group, by `match_groups` or the columns `path` and `group` of a list."""
    if pattern is not None:
        pairs = [*match_groups(find_images(images), pattern, "--group", None).items()]
    elif len(images) != 1 or not os.path.isfile(images[0]) or is_image(images[0]):
        raise UserError("--by group: add --group REGEX, or name a list with a column group as IMAGES")
    else:
        file, pairs = images[0], []
        columns, rows = read_rows(file)
        if "group" not in columns:
            raise UserError(f"{file} has no column group: add it, or use --group REGEX")
        for line, row in rows:
            if not row["group"]:
                raise UserError(f"{file}, line {line}: no group: name one, or use --group REGEX")
            pairs.append((beside(file, row["path"]), row["group"]))
    groups: dict[str, list[str]] = defaultdict(list)
    for path, name in dict.fromkeys(pairs):
        groups[name].append(path)
    return groups


def join_groups(findings: Findings, names: Mapping[str, str], near: bool) -> dict[str, str]:
    """Return the group of each image: its digest, or `group NAME` where there are names.

    Copies of a file are one group, and with `near` images that look the same. Groups with an image in
    common are one, of the last name.
    """
    joined = DisjointSet(finding.digest for finding in findings.values())
    for path, finding in findings.items():
        if path in names:
            joined.add(f"group {names[path]}")
            joined.merge(f"group {names[path]}", finding.digest)
    if near:
        hashes = {finding.digest: finding.perceptual_hash for finding in findings.values()}
        for digest, alike in look_alike_groups(hashes).items():
            joined.merge(digest, alike)
    # "group" is after the hexadecimal digits: images that join a group do not move its position.
    keys = {node: max(part) for part in joined.subsets() for node in part}
    return {path: keys[finding.digest] for path, finding in findings.items()}
