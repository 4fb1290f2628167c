from bcnn.data.image_files import find_images  # noqa: F401  alias: removed at the merge
