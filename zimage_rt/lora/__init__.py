"""LoRAs: reading their files, matching their layers to a bundle's, and applying them to an engine."""
