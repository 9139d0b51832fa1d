# SPDX-License-Identifier: MIT
"""timm's models on the kernels. ``import convmixer.timm`` registers timm's convmixer_* models again, accelerated:

    import timm, convmixer.timm
    model = timm.create_model("convmixer_1536_20", pretrained=True)

:func:`accelerate_all` does it for every model of timm. timm's own scripts run with it by

    python -m convmixer.timm [--all] train.py ARGUMENTS OF THE SCRIPT
    torchrun --nproc-per-node 8 -m convmixer.timm [--all] validate.py ARGUMENTS OF THE SCRIPT

Names, arguments, pretrained weights and state_dict keys stay timm's. The logger "convmixer" tells at INFO level, which those scripts show,
how much of a model was accelerated. A feature extractor that timm traces with torch.fx runs torch's modules: right, but not faster.
"""

from __future__ import annotations

import argparse
import functools
import logging
import runpy
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
from torch import nn

from .accelerate import accelerate

logger = logging.getLogger("convmixer")


def accelerate_all() -> None:
    """From now on timm.create_model returns each model accelerated, in place of :func:`convmixer.accelerate` on it."""
    _register(timm.list_models())


def _register(names: Iterable[str]) -> None:
    for name in names:
        create = timm.models.model_entrypoint(name)
        if not hasattr(create, "_accelerates"):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", f"Overwriting {name} in registry")
                timm.models.register_model(_accelerated(create))


def _accelerated(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    # with the name and module of timm's function, by which timm finds its pretrained weights
    @functools.wraps(create)
    def entrypoint(*args: Any, **kwargs: Any) -> nn.Module:
        model = create(*args, **kwargs)
        logger.info("%s: %s", create.__name__, accelerate(model))
        return model

    entrypoint._accelerates = True  # type: ignore[attr-defined]
    return entrypoint


def main(argv: list[str] | None = None) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` does, after the registration."""
    parser = argparse.ArgumentParser(
        prog="python -m convmixer.timm",
        description="Run a script, such as timm's train.py, with accelerated timm models.",
    )
    parser.add_argument(
        "--all", action="store_true", help="accelerate every model that timm creates, not only convmixer_*"
    )
    parser.add_argument("script", type=Path, help="the script's path")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    given = parser.parse_args(argv)
    if not given.script.is_file():
        parser.error(f"there is no file {given.script}; timm's scripts are in its repository, not in the package")
    if given.all:
        accelerate_all()
    sys.argv = [str(given.script), *given.arguments]
    sys.path[0] = str(given.script.resolve().parent)
    runpy.run_path(str(given.script), run_name="__main__")


if __name__ == "__main__":
    # the module under its own name, so that a script's `import convmixer.timm` finds it
    from convmixer.timm import main as run

    run()
else:
    _register(timm.list_models(module="convmixer"))
