# SPDX-License-Identifier: MIT
"""Measure a checkpoint's accuracy: python -m convmixer.validate CHECKPOINT DATA.

DATA is as for convmixer.train, of which the held-out images are taken: val/, or for digits a fifth. All images of a folder
without val/ are taken.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from . import data as images
from .data import DataError
from .engine import Parallel, evaluate
from .predict import add_checkpoint, open_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convmixer.validate", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step, over all processes (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images (%(default)s)")
    parser.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        with Parallel.start(options.device) as parallel:
            model, preset = open_checkpoint(options, parallel)
            source = images.open_held_out(options.data, preset.classes, preset.n_classes)
            steps = images.EvaluationSteps(len(source.labels), options.batch_size, parallel.rank, parallel.world)
            samples = images.Images(source, images.augmentation("none", preset), preset.in_chans, seed=0)
            started = time.perf_counter()
            batches = images.loader(samples, steps, options.workers, parallel.device.type == "cuda")
            test = evaluate(model, batches, parallel, options.amp)
            rate = test.images / (time.perf_counter() - started)
            parallel.tell(
                f"{test.images} images: {test.top1:.2f} % right, {test.top5:.2f} % in the top five, "
                f"cross-entropy {test.loss:.4f}, {rate:.0f} images/s"
            )
    except DataError as error:
        print(f"error: {images.message(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
