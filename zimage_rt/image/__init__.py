"""Arrays and images: pixel formats, sizes, tiles, sheets."""
