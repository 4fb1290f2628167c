"""Image data: folders, lists and public sets, their splits, checks, decoding and transforms."""
