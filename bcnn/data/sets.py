"""Image sets by name."""

from filelock import FileLock

from bcnn.data import butterflies
from bcnn.data.folder import ImageFolderData


class Butterflies(ImageFolderData):
    """The embedded set: drawn into `root` on first use, then loaded like any other folder."""

    def prepare_data(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root.with_name(f".{self.root.name}.lock")):  # runs that start together
            butterflies.write(self.root)
