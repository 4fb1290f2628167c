"""Image sets by name."""

from bcnn.data import butterflies
from bcnn.data.folder import ImageFolderData


class Butterflies(ImageFolderData):
    """The embedded set: drawn into `root` on first use, then loaded like any other folder."""

    def prepare_data(self) -> None:
        butterflies.write(self.root)
