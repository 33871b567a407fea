"""Shared options of the commands, with their units, ranges and defaults, and the decorator that adds them.

A command's function has its own options as parameters; `with_options` adds the shared ones, which are read from the
context. Options of request fields have the defaults of `GenerateRequest`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backends.registry import BACKENDS
from ..request.codec import read_numbers, read_parts
from ..request.types import GenerateRequest
from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import SCHEDULES

# Options with another name than their request field.
FIELD_OF_OPTION = {"steps": "num_inference_steps"}


@dataclasses.dataclass(frozen=True)
class Shared:
    """A shared option: its type annotated with Typer's option, and its default."""

    annotation: Any
    default: Any


def _request(annotation: Any, field: str) -> Shared:
    return Shared(annotation, GenerateRequest.__dataclass_fields__[field].default)


SIZE = "Pixels, a multiple of what the bundle serves (16 in most). By default the image's size, or the bundle's own."

Bundle = Annotated[Path, typer.Argument(help="A folder that zimage-export wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON line for each image.")]

# Options of a request's fields, by the option's name.
REQUEST: Mapping[str, Shared] = {
    FIELD: _request(annotation, FIELD_OF_OPTION.get(FIELD, FIELD))
    for FIELD, annotation in {
        "negative_prompt": Annotated[
            str, typer.Option(help="What to steer away from; it needs --guidance-scale above 0. By default nothing.")
        ],
        "height": Annotated[int | None, typer.Option(help=SIZE)],
        "width": Annotated[int | None, typer.Option(help=SIZE)],
        "steps": Annotated[
            int | None,
            typer.Option("--steps", help="Steps of the sampler, 1 to 1000. By default the bundle's own; 8 for Turbo."),
        ],
        "guidance_scale": Annotated[
            float | None,
            typer.Option(
                help="How strongly to follow the prompt, 0 or more; 0 means no guidance. Other programs' CFG is one "
                "more. By default the bundle's own; 0 for Turbo."
            ),
        ],
        "cfg_truncation": Annotated[
            float,
            typer.Option(help="No guidance in the steps in which 1 - sigma is above this, from 0 to 1; 1 is never."),
        ],
        "cfg_normalization": Annotated[
            float,
            typer.Option(help="Limits a guided prediction's norm to this multiple of the unguided one's; 0: no limit."),
        ],
        "dynamic_cfg": Annotated[
            float,
            typer.Option(help="How much guidance follows the prompt's length and the step, from 0, not at all, to 1."),
        ],
        "vae": Annotated[
            str | None,
            typer.Option(
                help="tiny (fast) or full. By default tiny, but full if the bundle was exported for cuda with it."
            ),
        ],
        "sampler": Annotated[
            str,
            typer.Option(
                help="How the latents follow the sigmas. Names with diffusers_ give diffusers' numbers, plain ones "
                f"ComfyUI's; see docs/samplers.md: {', '.join(SAMPLERS)}."
            ),
        ],
        "schedule": Annotated[
            str,
            typer.Option(help=f"How sigmas fall over the steps, named like the samplers: {', '.join(SCHEDULES)}."),
        ],
        "shift": Annotated[
            float | None,
            typer.Option(
                help="The schedule's timestep shift, more than 0 and at most 100; larger ones spend more steps on "
                "the layout. By default the bundle's own; 3 for Turbo."
            ),
        ],
        # Parsed by Typer, so that commands have the values of the request's fields.
        "sigmas": Annotated[
            Any,
            typer.Option(
                parser=partial(read_numbers, "sigmas"),
                metavar="1.0,0.6,...",
                help="A schedule of your own: falling numbers, from at most 1 to more than 0; the last 0 is added. By "
                "default that of --schedule.",
            ),
        ],
        "image": Annotated[
            Path | None, typer.Option(help="An image file to begin with. By default images begin as noise alone.")
        ],
        "strength": Annotated[
            float,
            typer.Option(
                help="How far to go from --image, more than 0 to 1; 1, or more than 1 - 1/steps, ignores the image."
            ),
        ],
        "denoise": Annotated[
            float | None,
            typer.Option(
                help="ComfyUI's measure in place of --strength, more than 0 to 1: all steps are evaluated. By default "
                "--strength is used."
            ),
        ],
        "mask": Annotated[
            Path | None,
            typer.Option(
                help="An image file: white is drawn anew, black keeps --image to the byte. By default all is drawn."
            ),
        ],
        "mask_feather": Annotated[float, typer.Option(help="How soft the mask's edge is, in pixels, 0 or more.")],
        "fit": Annotated[
            str, typer.Option(help="How an image of another shape than the output is fitted: crop, pad or stretch.")
        ],
        "control_image": Annotated[
            Path | None,
            typer.Option(
                help="An image file (edges, depth, a pose) for the bundle's ControlNet to follow. By default none."
            ),
        ],
        "control_scale": Annotated[
            float, typer.Option(help="How closely to follow --control-image, 0 or more; 0 ignores it.")
        ],
        "second_pass": Annotated[
            Any,
            typer.Option(
                parser=partial(read_parts, "second_pass"),
                metavar="scale=2,strength=0.4,...",
                help="Draw again over the result: scale (of height and width; 1 refines; default 2), strength (default "
                "0.4) or denoise (as --strength and --denoise), method (pixel, the default, or latent), "
                "num_inference_steps. By default there is no second pass.",
            ),
        ],
        "batch_noise": Annotated[
            str,
            typer.Option(
                help="separate: each image has its own seed's noise; comfyui: one stream of the first seed for all."
            ),
        ],
        "fit_size": Annotated[
            str,
            typer.Option(help="exact refuses a size that is no multiple of the bundle's; nearest takes the nearest."),
        ],
        "truncate_prompt": Annotated[
            bool,
            typer.Option(
                "--truncate-prompt",
                help="Cut prompts that are too long, as diffusers does. By default they are refused.",
            ),
        ],
        "literal_prompt": Annotated[
            bool,
            typer.Option(
                "--literal-prompt",
                help="Take markers of the chat template, such as <|im_end|>, as text. By default they act as markers.",
            ),
        ],
        "vae_tile": Annotated[
            int | None,
            typer.Option(
                help="Decode in tiles of this many pixels, a multiple of 16 from 128, to save memory. By default whole."
            ),
        ],
    }.items()
}

SAVING: Mapping[str, Shared] = {
    "quality": Shared(
        Annotated[
            int | None,
            typer.Option(help="Of .jpg and .webp, 1 to 100. By default 95 for .jpg; .webp keeps every pixel."),
        ],
        None,
    ),
    "sidecar": Shared(Annotated[bool, typer.Option(help="Write each image's record beside it, as JSON.")], True),
}

LORAS: Mapping[str, Shared] = {
    "lora": Shared(
        Annotated[
            list[str] | None,
            typer.Option(
                "--lora", help="A LoRA's file, or file=weight; the weight is 1 by default. Repeat it for several."
            ),
        ],
        None,
    ),
    "lora_partial": Shared(
        Annotated[
            bool,
            typer.Option(
                "--lora-partial",
                help="Use the fitting part of a LoRA that does not fit whole, and say what was left out. By default it "
                "is refused.",
            ),
        ],
        False,
    ),
}

BACKEND: Mapping[str, Shared] = {
    "backend": Shared(
        Annotated[str, typer.Option(help=f"The library that runs the bundle: {', '.join(BACKENDS)}.")], "onnxruntime"
    ),
    "backend_option": Shared(
        Annotated[
            list[str] | None,
            typer.Option(
                "-O",
                "--backend-option",
                help="name=value for the backend, e.g. provider=cuda. Repeat it for several; see docs/backends.md.",
            ),
        ],
        None,
    ),
}


def select_options(group: Mapping[str, Shared], *names: str) -> dict[str, Shared]:
    """The named options of a group."""
    return {name: group[name] for name in names}


def with_options(*groups: Mapping[str, Shared]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add shared options to a Typer command, after its own; its function reads them from `ctx.params`."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.annotation
            )
            for group in groups
            for name, option in group.items()
        ]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            command(**{name: given[name] for name in own.parameters})

        run.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
        # typing.get_type_hints follows `__wrapped__`, whose annotations lack the shared options.
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own.parameters.values(), *added)}
        return run

    return add
