"""What classes are called on the levels above them: genera of species, kinds of groceries."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from bcnn.data.image_files import listed
from bcnn.data.lists import read_cells, read_rows
from bcnn.data.split_folders import class_name, confusable_names
from bcnn.utils.errors import UserError

FOLDERS = "folders"  # the value of data.taxonomy for class folders in folders of their parents

# By level, the classes first and then upward: a name for each class, in the order of the classes.
Taxonomy = dict[str, list[str]]


def find_taxonomy(
    source: str | Path | Sequence[str] | None,
    images: Path | None,
    classes: Sequence[str],
    parents: Mapping[str, Sequence[str]],
) -> Taxonomy | None:
    """Return the taxonomy of these classes, by a file, columns of the list of images, or "folders".

    The first line of a file names the levels, `class,parent[,grandparent …]`, and each other line is of
    a class. Columns are those of the parent, the grandparent …. `parents` are the folders above each
    class, for `folder_taxonomy`. Raise UserError at what is no tree.
    """
    if source is None:
        return None
    if source == FOLDERS:
        return folder_taxonomy(parents, classes)
    if isinstance(source, str | Path):
        file = Path(source).expanduser()
        (_, levels), *rows = read_cells(file, "a first line of class,parent and a line for each class")
    elif images is None:
        raise UserError("data.taxonomy names columns, and there is no data.list: name a file")
    else:
        file, levels = images, ["label", *(str(name).lower() for name in source)]
        columns, of_images = read_rows(images)
        if missing := [name for name in levels if name not in columns]:
            raise UserError(f"data.taxonomy: {images} has no column {listed(missing)}")
        cells = [(line, [row[name] for name in levels]) for line, row in of_images]
        rows = [*{tuple(row): (line, row) for line, row in cells}.values()]
    if not 1 < len(levels) == len({*levels} - {""}):
        raise UserError(f"{file}: expected a first line of names of levels, as class,parent")
    for line, row in rows:
        if len(row) != len(levels) or "" in row:
            raise UserError(f"{file}, line {line}: expected a name for each of {', '.join(levels)}")
    names = [[class_name(row[k]) for _, row in rows] for k in range(len(levels))]
    _validate_tree(names, levels[0], file)
    return arrange(dict(zip(levels, names, strict=True)), classes, str(file))


def folder_taxonomy(parents: Mapping[str, Sequence[str]], classes: Sequence[str]) -> Taxonomy:
    """Return the taxonomy of classes by the folders above each: `folder 1` is the outermost.

    A class whose folder is less deep than others is its own parent.
    """
    if not (depth := max((len(parents.get(name, ())) for name in classes), default=0)):
        raise UserError(
            "data.taxonomy=folders: put class folders into folders of their parents, in data.root"
        )
    ways = [[*parents[name], *[name] * (depth - len(parents[name]))] for name in classes]
    levels = {f"folder {k + 1}": [way[k] for way in ways] for k in reversed(range(depth))}
    _validate_tree([classes, *levels.values()], "class", Path("data.taxonomy=folders"))
    return {"class": [*classes], **levels}


def is_of_folders(taxonomy: Taxonomy | None) -> bool:
    """Return whether `folder_taxonomy` made it, so that its classes are in nested folders."""
    return "folder 1" in (taxonomy or {})


def arrange(taxonomy: Taxonomy, classes: Sequence[str], source: str) -> Taxonomy:
    """Return the taxonomy of these classes, in their order; raise UserError where it lacks one."""
    position = {name: k for k, name in enumerate(next(iter(taxonomy.values())))}
    if missing := [name for name in classes if name not in position]:
        raise UserError(f"{source} lacks the class {listed(missing)}: add it in data.taxonomy=FILE")
    return {level: [names[position[name]] for name in classes] for level, names in taxonomy.items()}


def _validate_tree(names: Sequence[Sequence[str]], level: str, file: Path) -> None:
    """Raise UserError if a class is named twice, or a name has two parents."""
    if twice := [name for name, count in Counter(names[0]).items() if count > 1]:
        raise UserError(f"{file} names the {level} {twice[0]} twice: remove a line, or correct it")
    for above in names[1:]:
        if alike := confusable_names(sorted({*above})):
            raise UserError(f"{file}: names look the same: {listed(alike, 3)}; rename one of each")
    for below, above in pairwise(names):
        parents: dict[str, str] = {}
        for name, parent in zip(below, above, strict=True):
            if (first := parents.setdefault(name, parent)) != parent:
                both = f"{file}: {name} is in {first} and in {parent}"
                raise UserError(f"{both}: give it one parent, or two names")
