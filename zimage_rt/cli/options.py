"""Options that several commands have, with their units, ranges and defaults."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backends.registry import BACKENDS
from ..request.codec import read_numbers, read_parts
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import SCHEDULES

OF_SIZE = "Pixels, a multiple of what the bundle serves (16 in most). By default the image's, or the bundle's own size."

Bundle = Annotated[Path, typer.Argument(help="A folder that zimage-export wrote.")]
Height = Annotated[int | None, typer.Option(help=OF_SIZE)]
Width = Annotated[int | None, typer.Option(help=OF_SIZE)]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Steps of the sampler, 1 to 1000. By default the bundle's own; 8 for Turbo."),
]
NegativePrompt = Annotated[str, typer.Option(help="What to steer away from; it needs --guidance-scale above 0.")]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="How strongly to follow the prompt, 0 or more; 0 means no guidance. Other programs' CFG is one more. "
        "By default the bundle's own; 0 for Turbo."
    ),
]
CfgTruncation = Annotated[
    float, typer.Option(help="Guidance is off in the steps where 1 - sigma is more than this, from 0 to 1.")
]
CfgNormalization = Annotated[
    float,
    typer.Option(help="Limits the guided prediction's norm to so many times the unguided one's; 0 does not limit it."),
]
DynamicCfg = Annotated[
    float, typer.Option(help="How far guidance follows the prompt's length and the step, from 0, not at all, to 1.")
]
Seed = Annotated[
    int | None,
    typer.Option(help="Of the first image, 0 to 2^64 - 1; the others count up. By default random, and printed."),
]
Vae = Annotated[str | None, typer.Option(help="tiny (fast) or full. By default tiny, if the bundle has it.")]
Sampler = Annotated[
    str, typer.Option(help=f"Plain names are ComfyUI's; docs/samplers.md says more: {', '.join(SAMPLERS)}.")
]
Schedule = Annotated[
    str, typer.Option(help=f"Plain names are ComfyUI's; docs/samplers.md says more: {', '.join(SCHEDULES)}.")
]
Shift = Annotated[
    float | None,
    typer.Option(help="Of the schedule, more than 0 and at most 100. By default the bundle's own; 3 for Turbo."),
]
# Parsed as they are read: what follows takes options for the request's fields.
Sigmas = Annotated[
    Any,
    typer.Option(
        parser=partial(read_numbers, "sigmas"),
        metavar="1.0,0.6,...",
        help="A schedule of your own: numbers that fall, from at most 1 to more than 0; the last 0 is added. By "
        "default that of --schedule.",
    ),
]
StartImage = Annotated[
    Path | None, typer.Option(help="An image file to begin from. By default images begin from noise alone.")
]
Strength = Annotated[
    float,
    typer.Option(help="How far to go from --image, more than 0 to 1; 1, or more than 1 - 1/steps, ignores the image."),
]
Denoise = Annotated[
    float | None,
    typer.Option(
        help="ComfyUI's measure in place of --strength, more than 0 to 1: all steps are evaluated. By default "
        "--strength is used."
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="An image file: where to draw anew is white, what to keep of --image black. By default all is drawn."
    ),
]
MaskFeather = Annotated[float, typer.Option(help="How soft the mask's edge is, in pixels, 0 or more.")]
Fit = Annotated[str, typer.Option(help="How an image of another shape is fitted: crop, pad or stretch.")]
ControlImage = Annotated[
    Path | None, typer.Option(help="An image file that the bundle's ControlNet is to follow. By default none.")
]
ControlScale = Annotated[
    float, typer.Option(help="How closely to follow --control-image, 0 or more; 0 draws as without it.")
]
AgainOver = Annotated[
    Any,
    typer.Option(
        parser=partial(read_parts, "second_pass"),
        metavar="scale=2,strength=0.4,...",
        help="Draw again over the result: scale (of height and width; 1 refines; default 2), strength (default 0.4) or "
        "denoise (as --strength and --denoise), method (pixel, the default, or latent), num_inference_steps. By "
        "default there is no second pass.",
    ),
]
BatchNoise = Annotated[
    str,
    typer.Option(
        help="separate: each image has its own seed's noise; comfyui: one stream of the first seed's for all."
    ),
]
FitSize = Annotated[
    str, typer.Option(help="exact refuses a size that is no multiple of the bundle's step; nearest takes the nearest.")
]
TruncatePrompt = Annotated[
    bool,
    typer.Option(
        "--truncate-prompt", help="Cut prompts that are too long, as diffusers does. By default they are refused."
    ),
]
LiteralPrompt = Annotated[
    bool,
    typer.Option(
        "--literal-prompt",
        help="Take markers of the chat template, such as <|im_end|>, as text. By default they act as markers.",
    ),
]
VaeTile = Annotated[
    int | None,
    typer.Option(
        help="Decode in tiles of so many pixels, a multiple of 16 from 128, to save memory. By default whole."
    ),
]
Quality = Annotated[
    int | None,
    typer.Option(help="Of .jpg and .webp, 1 to 100. By default 95 for .jpg; .webp keeps every pixel without it."),
]
Sidecar = Annotated[bool, typer.Option(help="Write each image's record beside it, as JSON.")]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help="A LoRA's file, or file=weight, where the weight is 1 by default; repeat for several."),
]
LoraPartial = Annotated[
    bool,
    typer.Option(
        "--lora-partial",
        help="Use what fits of a LoRA that does not fit whole, and say what does not. By default it is refused.",
    ),
]
Backend = Annotated[str, typer.Option(help=f"What runs the bundle: {', '.join(BACKENDS)}.")]
BackendOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-O",
        "--backend-option",
        help="name=value for the backend, e.g. provider=cuda; repeat for several. docs/backends.md lists them.",
    ),
]
