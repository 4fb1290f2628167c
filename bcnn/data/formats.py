from bcnn.data.image_files import images_below  # noqa: F401  alias: removed at the merge
from bcnn.data.image_io import FORMATS, open_image  # noqa: F401  alias: removed at the merge
