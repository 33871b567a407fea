"""Records of how images were made, and the image files and sidecars that hold them."""
