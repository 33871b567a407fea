"""LoRAs: layouts of files, places of layers, and the set that an engine has on."""
