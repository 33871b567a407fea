"""`zimage-export`: turns a Z-Image checkpoint into a bundle. The only part of zimage_rt that needs PyTorch."""
