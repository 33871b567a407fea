"""Compare the training twins with the reference implementations, with random weights, in fp32."""

from __future__ import annotations

import architecture
import torch
import torch.nn.functional as F
from diffusers import ZImageControlNetModel
from fast_controlnet import CHANNELS, FastControlNet
from fast_models import FastTextEncoder, FastTransformer, patchify, unpatchify
from scenes import CANVASES


@torch.no_grad()
def main() -> None:
    parts = architecture.fresh(seed=1)
    transformer, encoder = FastTransformer().eval(), FastTextEncoder().eval()
    transformer.initialise()
    encoder.initialise()
    for parameter in transformer.parameters():  # a zero would not be compared
        parameter.add_(0.02 * torch.randn_like(parameter))
    parts.transformer.load_state_dict(transformer.state_dict())
    parts.text_encoder.load_state_dict(encoder.state_dict())
    net = FastControlNet(places=(0, 2))
    net.begin_from(transformer)
    for parameter in net.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    original = ZImageControlNetModel.from_transformer(net.original(), parts.transformer)
    for padded, lengths in ((32, (20, 31)), (64, (33, 64))):
        ids = torch.randint(0, architecture.TEXT_ENCODER["vocab_size"], (2, padded))
        mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
        reference = parts.text_encoder(ids, attention_mask=mask, output_hidden_states=True)
        features = encoder(ids)
        text_error = (features - reference.hidden_states[-2])[mask].abs().max().item()
        captions = [f[:n] for f, n in zip(features, lengths, strict=True)]
        for width, height in CANVASES:
            latents, t = torch.randn(2, 16, height // 8, width // 8), torch.tensor([0.1, 0.7])
            expected = parts.transformer(list(latents.unsqueeze(2)), t, captions).sample
            patches = patchify(latents)
            found = transformer(patches, t, features, torch.tensor(lengths), (width, height))
            # Every place kept, in another order: the same answers in that order.
            order = torch.stack([torch.randperm(patches.shape[1]) for _ in range(2)])
            index = order.unsqueeze(-1).expand_as(patches)
            shuffled = transformer(patches.gather(1, index), t, features, torch.tensor(lengths), (width, height), order)
            shuffle_error = (shuffled - found.gather(1, index)).abs().max().item()
            found = unpatchify(found, (width, height))
            error = max(shuffle_error, (found - torch.stack(expected).squeeze(2)).abs().max().item())
            scale = found.abs().mean().item()
            shown = F.pad(torch.randn_like(latents), (0, 0, 0, 0, 0, CHANNELS - latents.shape[1]))
            hints = original(list(latents.unsqueeze(2)), t, captions, list(shown.unsqueeze(2)), 0.7)
            expected = parts.transformer(list(latents.unsqueeze(2)), t, captions, controlnet_block_samples=hints).sample
            inputs = (t, features, torch.tensor(lengths), (width, height))
            followed = unpatchify(net(transformer, patches, patchify(shown), *inputs, scale=0.7), (width, height))
            control_error = (followed - torch.stack(expected).squeeze(2)).abs().max().item()
            moved = (followed - found).abs().mean().item()
            errors = f"text {text_error:.1e}, transformer {error:.1e} of {scale:.2f}"
            errors += f", ControlNet {control_error:.1e} of {moved:.2f}"
            print(f"{width} x {height}, length {padded}: {errors}")
            if not (max(text_error, error, control_error) < 1e-4 and min(scale, moved) > 0.01):
                raise SystemExit("the training twins differ from the reference")


if __name__ == "__main__":
    main()
