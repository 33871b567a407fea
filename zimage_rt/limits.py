"""Upper bounds of a request on every bundle, checked before anything is allocated or computed.

A bundle's own ranges (`ShapeRanges`) are mostly narrower, and are checked too.
"""

from __future__ import annotations

# Steps per schedule, and entries of `sigmas`: the checkpoints were trained on 1000 noise levels.
MAX_STEPS = 1000
# Prompts times images per prompt.
MAX_BATCH = 1024
# Pixels of an output image: per side, and in all (8192 x 8192).
MAX_SIDE = 1 << 16
MAX_PIXELS = 1 << 26
# Characters per prompt; 512 tokens are about 2,000 characters of English.
MAX_PROMPT_CHARACTERS = 100_000
# Pixels of an input image, by its file's header. Pillow warns above 89.5 megapixels.
MAX_INPUT_PIXELS = 89_000_000
# Guidance scales of other programs and papers are below 30; beyond this float32 latents overflow.
MAX_GUIDANCE = 1000.0
# The timestep shift; as it approaches 0 every sigma becomes 0.
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MAX_CONTROL_SCALE = 100.0
# Scale of the second pass relative to the first.
MAX_UPSCALE = 64.0
# Pixels of a mask's soft edge.
MAX_FEATHER = 1000.0
# Absolute value of a LoRA's weight; a LoRA is trained for 1.
MAX_LORA_WEIGHT = 1e30
# Requests that an engine computes concurrently.
MAX_CONCURRENCY = 1024
