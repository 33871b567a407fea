"""Muon for the hidden matrices, AdamW for the rest, and the average of the weights.

Muon (Keller Jordan, 2024): momentum, orthogonalised by a Newton–Schulz iteration. Matrices of one
shape are batched, which takes a few launches per step instead of hundreds.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor) -> Tensor:
    """Move the singular values of [batch, rows, columns] towards one (five quintic steps)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()


class Muon:
    """The optimiser of the hidden matrices; a convolution counts as [out, in × kernel]."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, decay: float = 0.01) -> None:
        groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            groups[parameter.shape].append(parameter)
        self._groups = list(groups.values())
        self._momenta = [torch.stack([torch.zeros_like(p).flatten(1) for p in g]) for g in self._groups]
        self.lr, self.decay = lr, decay

    @torch.no_grad()
    def step(self, scale: float, momentum: float = 0.95) -> None:
        """Take one step at ``scale`` times the learning rate."""
        lr = self.lr * scale
        for group, buffer in zip(self._groups, self._momenta, strict=True):
            gradient = torch.stack([p.grad.flatten(1) for p in group])
            buffer.lerp_(gradient, 1 - momentum)
            update = orthogonalise(gradient.lerp(buffer, momentum))
            rows, columns = update.shape[1:]
            update *= math.sqrt(max(1.0, rows / columns))
            torch._foreach_mul_(group, 1 - lr * self.decay)
            steps = update.unflatten(2, group[0].shape[1:])
            torch._foreach_add_(group, list(steps.unbind()), alpha=-lr)


class Optimiser:
    """Both optimisers over one set of modules, under one schedule."""

    def __init__(self, modules: list[nn.Module], lr: float, muon_lr: float) -> None:
        hidden, other = [], []
        for module in modules:
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                in_block = name.startswith(("layers.", "noise_refiner.", "context_refiner."))
                matrix = parameter.ndim == 2 and in_block and "adaLN" not in name
                matrix = matrix or (parameter.ndim == 4 and "conv_in" not in name)
                (hidden if matrix and muon_lr > 0 else other).append(parameter)
        self._all = hidden + other
        self._lr = lr
        self._muon = Muon(hidden, muon_lr) if hidden else None
        fused = other[0].is_cuda
        self._adam = torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)

    def step(self, scale: float) -> None:
        """Clip, step both at ``scale`` times their rates, and clear the gradients."""
        used = [p for p in self._all if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(used, 1.0, foreach=True)
        if self._muon:
            self._muon.step(scale)
        for group in self._adam.param_groups:
            group["lr"] = self._lr * scale
        self._adam.step()
        for parameter in used:
            parameter.grad = None


class Average:
    """Exponential moving average of modules' weights."""

    def __init__(self, modules: list[nn.Module], decay: float, young: bool = True) -> None:
        self._live = [p for m in modules for p in m.parameters()]
        self.values = [p.detach().clone() for p in self._live]
        self._decay, self._steps = decay, 0 if young else 10_000

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights; a young average has a shorter memory."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self.values, self._live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights with the average."""
        for live, value in zip(self._live, self.values, strict=True):
            kept = live.detach().clone()
            live.copy_(value)
            value.copy_(kept)


def warm_hold_fall(progress: float, warmup: float = 0.02, fall: float = 0.4, floor: float = 0.0) -> float:
    """Return the learning rate's factor at ``progress`` in [0, 1]: warm-up, constant, linear decay."""
    if progress < warmup:
        return max(progress, 0.02 * warmup) / warmup
    return floor + (1 - floor) * min(1.0, max(0.0, 1 - progress) / fall)


class Clock:
    """Counts training seconds instead of wall time, and can end the schedule early.

    A step counts for at most ``most`` seconds, so compiling, saving or a paused process (SIGSTOP) do not
    use up the schedule. If the file ``stop`` appears, the seconds in it remain.
    """

    def __init__(self, seconds: float, stop: Path, start: float = 0.0, most: float = 1.0) -> None:
        self.total, self.seconds, self._most, self._stop = seconds, start, most, stop
        self._last = time.monotonic()
        self._stopping, self._fall_from, self._before = False, 0.0, 1.0

    def tick(self) -> None:
        """Count a step."""
        now = time.monotonic()
        self.seconds += min(now - self._last, self._most)
        self._last = now

    def skip(self) -> None:
        """Exclude the time since the last tick."""
        self._last = time.monotonic()

    def look(self) -> None:
        """Check for the stop file."""
        if self._stopping or not self._stop.exists():
            return
        text = self._stop.read_text().strip()
        remaining = float(text) if text else 60.0
        # The remaining seconds become the schedule's fall, however much of it was left.
        self._stopping = True
        self.total, self._fall_from = self.seconds + remaining, self.seconds
        print(f"stop file: {remaining:.0f} s remain", flush=True)

    def done(self) -> bool:
        return self.seconds >= self.total

    def factor(self, fall: float = 0.4, floor: float = 0.0) -> float:
        """Return the current factor of the learning rate."""
        if self._stopping:
            span = max(self.total - self._fall_from, 1e-6)
            return max(floor, min(self._before, (self.total - self.seconds) / span))
        self._before = warm_hold_fall(self.seconds / self.total, fall=fall, floor=floor)
        return self._before
