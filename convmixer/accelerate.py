# SPDX-License-Identifier: MIT
"""Put the layers of an existing model on the kernels, in place."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from convmixer_kernels.recognize import changed_for_all

from .model import MixerLayer, MixerSequential
from .recognize import recognize_layer


@dataclass
class Report:
    """What :func:`accelerate` did."""

    accelerated: int = 0  # layers that now run on the kernels, including those that did so before
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name in the model, reason)

    def __str__(self) -> str:
        lines = [f"accelerated {self.accelerated} mixer layer{'' if self.accelerated == 1 else 's'}"]
        if not self.accelerated and not self.skipped:
            lines[0] += ": found none"
        if self.skipped:
            lines[0] += f", left {len(self.skipped)} unchanged:"
        lines += [f"  {name or 'the model itself'}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Swap the class of every mixer layer in `model` for MixerLayer, in place; parameters, keys and results stay.

    Equivalent to, for each nn.Sequential in the model that is a mixer layer of the reference or of timm's ConvMixer:

        layer.__class__ = MixerLayer

    and, for each nn.Sequential that contains such layers, so that it can run them in one call:

        sequence.__class__ = MixerSequential

    Args:
        model: any module that contains such layers, or is one. Calling again is harmless.

    Returns:
        A :class:`Report`. Print it to read how many layers were accelerated, and for the others the reason why not.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be an nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        if not _resembles_layer(module):
            continue
        reason = _why_not(module)
        if reason is not None:
            report.skipped.append((name, reason))
            continue
        if type(module) is nn.Sequential:
            module.__class__ = MixerLayer
        report.accelerated += 1
    for module in model.modules():
        if type(module) is nn.Sequential and any(type(child) is MixerLayer for child in module):
            module.__class__ = MixerSequential
    return report


def _resembles_layer(module: nn.Module) -> bool:
    """Whether the module looks enough like a mixer layer to deserve a line in the report.

    It does if it is a Sequential of a module around a Sequential(conv, ...), then a conv.
    """
    if isinstance(module, MixerLayer):
        return True
    if not isinstance(module, nn.Sequential) or len(module) < 2 or not isinstance(module[1], nn.Conv2d):
        return False
    if module[0] is None:
        return False
    inner = list(module[0].children())
    return len(inner) == 1 and isinstance(inner[0], nn.Sequential) and isinstance(next(iter(inner[0]), None), nn.Conv2d)


def _why_not(module: nn.Sequential) -> str | None:
    if not isinstance(module, MixerLayer) and type(module) is not nn.Sequential:
        return f"its class, {type(module).__name__}, is not nn.Sequential itself"
    if "forward" in module.__dict__:
        return "it has its own forward"
    blocks = changed_for_all() or recognize_layer(module)
    return blocks if isinstance(blocks, str) else None
