"""How much a request may ask for, whatever the bundle: each limit is checked before anything is made or computed.

A bundle's own ranges (`ShapeRanges`) are narrower in most cases and are checked, too.
"""

from __future__ import annotations

# Of a schedule, and of `sigmas`: the noise levels that the checkpoints were trained on are 1000.
MAX_STEPS = 1000
# Prompts times images each.
MAX_BATCH = 1024
# Of an image's side, and of its area: 8192 x 8192.
MAX_SIDE = 1 << 16
MAX_PIXELS = 1 << 26
# Of each prompt; 512 tokens are about 2,000 characters of English.
MAX_PROMPT_CHARACTERS = 100_000
# Of an input image, by its file's header. Pillow warns of what is larger than 89.5 megapixels.
MAX_INPUT_PIXELS = 89_000_000
# The CLIs' and papers' guidance scales are below 30; beyond this float32 latents overflow.
MAX_GUIDANCE = 1000.0
# Of the timestep shift; towards 0 every sigma becomes 0.
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0
MAX_CONTROL_SCALE = 100.0
# Of the second pass, against the first.
MAX_UPSCALE = 64.0
# Pixels of a mask's soft edge.
MAX_FEATHER = 1000.0
# Either way from 0; a LoRA is trained for 1.
MAX_LORA_WEIGHT = 1e30
# Requests that an engine computes at once.
MAX_CONCURRENCY = 1024
