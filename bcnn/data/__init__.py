"""Image sets: folders of photographs, and the embedded procedural butterflies."""

from bcnn.data.formats import register_plugins

register_plugins()  # here, so that whatever decodes an image, in whichever process, can decode it
