"""Image sets: folders of photographs, and the embedded procedural butterflies."""
