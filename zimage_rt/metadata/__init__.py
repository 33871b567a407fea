"""Records of images, and the files that hold them."""
