"""Second-order poolings: maps of an image in, one row out."""
