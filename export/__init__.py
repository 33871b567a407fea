"""`zimage-export`: exports Z-Image checkpoints to bundles. zimage_rt needs PyTorch only here."""
