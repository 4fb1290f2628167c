"""The command `bcnn`: one verb, and what it takes."""

import os
import sys
from importlib import import_module

from bcnn.utils.options import command

VERBS = {
    "train": ("bcnn.cli.train", "both stages, or one, on the photographs of a folder"),
    "data": ("bcnn.cli.check", "look at a folder of photographs before training"),
    "evaluate": ("bcnn.cli.evaluate", "figures and a report on labelled photographs"),
    "predict": ("bcnn.cli.predict", "the likeliest classes of photographs"),
    "explain": ("bcnn.cli.explain", "which places of a photograph spoke for its class"),
    "demo": ("bcnn.cli.demo", "a page on this machine to drop photographs on"),
    "export": ("bcnn.cli.export", "ONNX, torch.export, and other forms of a model"),
    "store": ("bcnn.cli.cache", "list and remove the descriptors that training keeps"),
}
USAGE = "\n".join(
    (
        "Fine-grained image recognition with bilinear CNNs.\n",
        "bcnn VERB [OPTION=VALUE ...]\n",
        *(f"  {verb:10} {sentence}" for verb, (_, sentence) in VERBS.items()),
        '\nCompletion in bash: eval "$(bcnn train --shell-completion install=bash)"; also zsh, fish.',
        "bcnn VERB --help has the options. To begin with, photographs in PHOTOS/<class>/*:\n",
        "  bcnn train data=folder data.root=PHOTOS",
    )
)


def main() -> int:
    """Do what the first argument says, with the others; returns the exit code."""
    verb, *words = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb == "-sc":
        return _complete([verb, *words])
    if verb not in VERBS:
        print(f"error: there is no verb {verb}: choose from {', '.join(VERBS)}", file=sys.stderr)
        return 1
    room = import_module(VERBS[verb][0])
    if verb == "train":
        return int(room.main(words))
    return command(room.Options, room.main, room.USAGE, words)


def _complete(words: list[str]) -> int:
    """Tell a shell the verbs, or what Hydra knows of the options of `train`."""
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()
    if len(typed) + line.endswith(" ") <= 2:
        print(*VERBS)
    elif typed[1] == "train":
        os.environ["COMP_LINE"] = line.replace(" train", "", 1)
        os.environ["COMP_POINT"] = str(int(os.environ["COMP_POINT"]) - len(" train"))
        return int(import_module(VERBS["train"][0]).main(words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
