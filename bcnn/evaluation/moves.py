"""Proposed moves of images to other classes, and their carrying out in a new list or folder."""

import os
import shutil
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from bcnn.data.index import ImageIndex
from bcnn.data.lists import read_rows
from bcnn.data.split_folders import class_name
from bcnn.evaluation.predictions import Predictions
from bcnn.evaluation.tables import write_csv
from bcnn.utils.errors import UserError
from bcnn.utils.files import atomic_folder

MOVES = ("path", "label", "proposed_label", "probability")  # columns of a list of moves

Moves = Mapping[str, tuple[str, str]]  # by path of an image: its class, and the one to move it to


def write_moves(path: Path, held_out: Predictions) -> None:
    """Write the `doubtful_labels` of held-out images as a list of moves, for a person to edit."""
    names, predicted, confidence = held_out.classes, held_out.predicted, held_out.confidence
    rows = [
        (held_out.paths[i], names[held_out.labels[i]], names[predicted[i]], f"{confidence[i]:.6f}")
        for i in held_out.doubtful_labels()
    ]
    write_csv(path, MOVES, rows)


def read_moves(file: Path, images: Path, index: ImageIndex) -> Moves:
    """Read moves of the images in a folder or list; raise UserError at one that does not fit them."""
    columns, rows = read_rows(file)
    if not {*MOVES[:3]} <= {*columns}:
        raise UserError(f"{file} has other columns than {', '.join(MOVES[:3])}: name a list of moves")
    base = images.parent if images.is_file() else images
    known = {os.path.abspath(path): (path, index.classes[label]) for path, label in index.samples}
    moves: dict[str, tuple[str, str]] = {}
    for line, row in rows:
        old, new = class_name(row["label"]), class_name(row["proposed_label"])
        path, label = known.get(os.path.abspath(base / row["path"]), ("", ""))
        if not path:
            mistake = f"{row['path']} is not in {images}"
        elif path in moves:
            mistake = f"{row['path']} is in the list already"
        elif label != old:
            mistake = f"{row['path']} is labelled {label}, not {old}: the list is out of date"
        elif new not in index.classes:
            near = " or ".join(get_close_matches(new, index.classes, cutoff=0))
            mistake = f"no class {new}: did you mean {near}?"
        else:
            moves[path] = old, new
            continue
        raise UserError(f"{file}, line {line}: {mistake}")
    return moves


def write_corrected(output: Path, images: Path, index: ImageIndex, moves: Moves) -> None:
    """Write images with their moves carried out to a new list, if its name ends in .csv, or folder."""
    if output.exists() or output.resolve().is_relative_to(images.resolve()):
        raise UserError(f"--output {output} exists or is in {images}: name a new list or folder")
    if output.suffix == ".csv":
        _write_list(output, images, index, moves)
    elif images.is_dir():
        _copy_folder(output, images, index, moves)
    else:
        raise UserError(f"--output {output}: {images} is a list: name a new list, ending in .csv")


def _write_list(output: Path, images: Path, index: ImageIndex, moves: Moves) -> None:
    """Write a list; further columns of a list stay as they are."""
    columns = ["path", "label"] + ["split"] * index.divided + ["group"] * bool(index.groups)
    others = {}
    if images.is_file():
        names, rows = read_rows(images)
        columns += [name for name in names if name not in columns]
        others = {str(images.parent / row["path"]): row for _, row in rows}
    written = []
    for split, samples in index.splits.items():
        for path, label in samples:
            place = os.path.relpath(path, os.path.realpath(output.parent))
            _, name = moves.get(path, ("", index.classes[label]))
            own = {"path": place, "label": name, "split": split, "group": index.groups.get(path)}
            row = others.get(path, {}) | own
            written.append([row[column] for column in columns])
    write_csv(output, columns, written)


def _copy_folder(output: Path, images: Path, index: ImageIndex, moves: Moves) -> None:
    with atomic_folder(output) as part:
        shutil.copytree(images, part, dirs_exist_ok=True)
        for path, (old, new) in moves.items():
            inside = Path(path).relative_to(images)
            folders = [class_name(name) for name in inside.parent.parts]
            if old not in folders[index.divided :]:
                raise UserError(f"{path} is in no folder {old}: name a new list, --output NEW.csv")
            above, below = (index.parents.get(name, []) for name in (old, new))
            position = folders.index(old, index.divided + len(above))
            start = inside.parts[: position - len(above)]
            target = part.joinpath(*start, *below, new, *inside.parts[position + 1 :])
            target.parent.mkdir(parents=True, exist_ok=True)
            while target.exists():  # an image of the same name in the other class
                target = target.with_stem(f"{target.stem}-{old}")
            (part / inside).rename(target)
