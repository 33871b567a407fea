"""Images: pixel formats, conversion to arrays, resizing, tiled decoding, contact sheets and file formats."""
