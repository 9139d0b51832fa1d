# SPDX-License-Identifier: MIT
"""Train a ConvMixer: python -m convmixer.train DATA --epochs N --output DIR [--resume].

DATA is a folder with train/ and val/, one folder of images for each class in both; or one such folder, a fifth of which is held out;
or the word digits, for the 1797 real digits of 8x8 pixels that scikit-learn ships. Many processes or machines: torchrun
--nproc-per-node 8 -m convmixer.train ..., with DIR on a disk that all machines see.

DIR gets last.pt (everything that --resume needs), best.pth (the weights with the best held-out accuracy), log.csv, curves.png and
tensorboard/. convmixer.load, convmixer.predict and convmixer.validate read both checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from . import data as images
from .checkpoints import info_of, write_atomically, write_state
from .data import DataError
from .engine import Parallel, average, evaluate, parameter_groups
from .logs import Log, Progress, Row
from .presets import PRESETS, Preset
from .reference import ACTIVATIONS

#: Losses wait on the device for this many steps: reading one waits for the GPU.
_STEPS_A_FLUSH = 20
#: Options that may differ between a run and its --resume, because they do not change what is computed.
_FREE = ("resume", "output", "workers", "save_every", "device", "compile")
_DIGITS = {"dim": 64, "depth": 4, "kernel_size": 5, "patch_size": 1, "image_size": 8}
_FOLDER = {"dim": 256, "depth": 8, "kernel_size": 9, "patch_size": 7, "image_size": 224}


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m convmixer.train", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "data", metavar="DATA", help="a folder with train/ and val/, one folder that is split, or 'digits'"
    )
    parser.add_argument("--epochs", type=_positive, required=True, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of this run; made if needed")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/last.pt; without one, start")
    parser.add_argument("--reference", action="store_true", help="train the paper's code on torch's operations")
    model = parser.add_argument_group(
        "model", "default: 256/8, k 9, patch 7, 224 pixels; digits: 64/4, k 5, patch 1, 8"
    )
    model.add_argument("--model", choices=PRESETS, help="a published architecture, instead of the sizes below")
    for size in _FOLDER:
        model.add_argument(f"--{size.replace('_', '-')}", type=_positive, metavar="N")
    model.add_argument("--activation", choices=ACTIVATIONS)
    steps = parser.add_argument_group(
        "training", "AdamW (weights only decay, not norms and biases) and one cycle of the rate"
    )
    steps.add_argument("--batch-size", type=_positive, help="images of a step, over all processes (128; digits: 32)")
    steps.add_argument("--lr", type=float, default=0.01, help="highest learning rate (%(default)s)")
    steps.add_argument("--weight-decay", type=float, default=0.01, help="(%(default)s)")
    steps.add_argument("--label-smoothing", type=float, default=0.1, help="(%(default)s)")
    steps.add_argument(
        "--clip-grad", type=float, default=1.0, help="norm of all gradients at most; 0: no limit (%(default)s)"
    )
    steps.add_argument(
        "--ema", type=float, default=0.99, help="decay of the weights' moving average; 0: none (%(default)s)"
    )
    steps.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    change = parser.add_argument_group("images")
    change.add_argument(
        "--augment",
        choices=images.AUGMENTATIONS,
        help="rand: RandAugment, crops, mirroring and erasing by torchvision (default for folders); crop: crops and mirroring "
        "(if torchvision is missing); shift (default for digits); none",
    )
    change.add_argument(
        "--mixup", type=float, default=0.0, metavar="ALPHA", help="0: none; needs torchvision (%(default)s)"
    )
    change.add_argument(
        "--cutmix", type=float, default=0.0, metavar="ALPHA", help="0: none; needs torchvision (%(default)s)"
    )
    change.add_argument(
        "--workers", type=int, help="processes that read images (default: a CPU each, at most 8; digits: 0)"
    )
    speed = parser.add_argument_group("device")
    speed.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    speed.add_argument("--amp", choices=("none", "bf16", "fp16"), default="none", help="autocast (%(default)s)")
    speed.add_argument("--compile", action="store_true", help="torch.compile")
    speed.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="of torchrun's processes (%(default)s)"
    )
    speed.add_argument("--sync-bn", action="store_true", help="batch norm over all processes")
    speed.add_argument(
        "--save-every", type=_positive, default=500, metavar="STEPS", help="beside each epoch's end (%(default)s)"
    )
    options = parser.parse_args(arguments)
    for name, low, high in (("ema", 0, 1), ("label_smoothing", 0, 1), ("lr", 0, float("inf"))):
        if not low <= getattr(options, name) < high:
            parser.error(f"--{name.replace('_', '-')} must be in [{low}, {high}), got {getattr(options, name)}")
    for name in ("mixup", "cutmix", "clip_grad", "weight_decay"):
        if not getattr(options, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(options, name)}")
    if options.model and any(getattr(options, size) is not None for size in _DIGITS if size != "image_size"):
        parser.error("--model is a whole architecture: give it, or sizes")
    if options.batch_size is None:
        options.batch_size = 32 if options.data == images.DIGITS else 128
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _preset(options: argparse.Namespace, classes: tuple[str, ...]) -> Preset:
    digits = options.data == images.DIGITS
    changes: dict[str, Any] = {"n_classes": len(classes), "classes": classes}
    if digits:
        changes |= {"in_chans": 1, "mean": images.DIGITS_MEAN, "std": images.DIGITS_STD, "crop": 1.0, "image_size": 8}
    if options.activation:
        changes["activation"] = options.activation
    if options.model:
        preset = PRESETS[options.model]
        changes |= {"image_size": options.image_size} if options.image_size else {}
    else:
        sizes = _DIGITS if digits else _FOLDER
        preset = Preset(sizes["dim"], sizes["depth"])
        changes |= {size: getattr(options, size) or default for size, default in sizes.items()}
    preset = dataclasses.replace(preset, **changes)
    patch = preset.patch_size
    if isinstance(patch, int) and patch > preset.image_size:
        raise DataError(
            f"a patch of {patch} pixels does not fit an image of {preset.image_size}: give another --patch-size"
        )
    return preset


def _augmentation(options: argparse.Namespace, tell: Callable[[str], None]) -> str:
    if options.augment or options.data == images.DIGITS:
        return options.augment or "shift"
    try:
        images.require("torchvision.transforms.v2", "RandAugment")
    except DataError as error:
        tell(f"augmentation: random crops and mirroring only: {error}")
        return "crop"
    return "rand"


class Training:
    """One run: the model, its optimizer, its average and its steps, and what resumes them."""

    def __init__(self, options: argparse.Namespace, parallel: Parallel, stack: ExitStack) -> None:
        self.options, self.parallel = options, parallel
        found = images.open_data(options.data)
        self.preset = preset = _preset(options, found.classes)
        count, batch = len(found.train.labels), options.batch_size
        if batch % parallel.world:
            raise DataError(f"--batch-size {batch} cannot be shared by {parallel.world} processes")
        if count < batch:
            raise DataError(f"{count} images to train on are less than one step: give a --batch-size below {batch}")
        self.steps_an_epoch = count // batch
        self.total = options.epochs * self.steps_an_epoch
        options.augment = _augmentation(options, parallel.tell)
        self.mix = images.mixing(options.mixup, options.cutmix, preset.n_classes)
        self.order = images.TrainingSteps(count, batch, parallel.rank, parallel.world, options.seed)
        self._build()
        self.step, self.best = 0, -1.0
        options.output.mkdir(parents=True, exist_ok=True)
        self._resume()
        workers = options.workers
        if workers is None:
            mine = max(1, (os.cpu_count() or 1) // parallel.local_world)
            workers = 0 if options.data == images.DIGITS else min(8, mine)
        tests = images.EvaluationSteps(len(found.held_out.labels), batch, parallel.rank, parallel.world)

        def loader(source: images.Source, augment: str, steps: Any) -> Any:
            change = images.augmentation(augment, preset)
            pinned = parallel.device.type == "cuda"
            return images.loader(images.Images(source, change, preset.in_chans, options.seed), steps, workers, pinned)

        self.train_images = loader(found.train, options.augment, self.order)
        self.test_images = loader(found.held_out, "none", tests)
        self.log = Log(options.output, self.step) if parallel.rank == 0 else None
        if self.log is not None:
            stack.callback(self.log.close)
        self.progress = Progress(self.total, self.step, batch, parallel.rank == 0)
        stack.callback(self.progress.close)
        size = f"{preset.dim}/{preset.depth}, k {preset.kernel_size}, patch {preset.patch_size}, {preset.image_size} pixels"
        self.progress.line(
            f"ConvMixer-{size}, {preset.activation}{', reference' if options.reference else ''}: {count} images to train on, "
            f"{len(found.held_out.labels)} held out, {preset.n_classes} classes; {parallel}"
        )

    def _build(self) -> None:
        options, parallel = self.options, self.parallel
        images.seed_all(options.seed, "model")
        model: nn.Module = self.preset.build(reference=options.reference).to(parallel.device)
        self.average = None
        if options.ema:
            self.average = AveragedModel(model, multi_avg_fn=average(options.ema), use_buffers=True)
        self.model, self.net = parallel.wrap(model, options.parallel, options.sync_bn)
        if self.average is not None:
            # FSDP's modules cannot be copied: shard the copy
            self.average.module = parallel.shard(self.average.module, options.parallel)
        if options.compile:
            self.net.compile()
        groups = parameter_groups(self.model, options.weight_decay)
        # eps as in the paper's training command
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, eps=1e-3)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, options.lr, total_steps=self.total + 1)
        self.scaler = torch.amp.GradScaler(parallel.device.type, enabled=options.amp == "fp16")

    def _settings(self) -> dict[str, Any]:
        settings = {name: value for name, value in vars(self.options).items() if name not in _FREE}
        return {**settings, "images": self.order.count}

    def _save(self) -> None:
        """last.pt: complete or not there, and never older than log.csv's rows that a resume keeps."""
        parallel = self.parallel
        state = {
            "state_dict": parallel.full_state(self.model),
            "state_dict_ema": None if self.average is None else parallel.full_state(self.average.module),
            "averaged": 0 if self.average is None else int(self.average.n_averaged),
            "optimizer": parallel.optimizer_state(self.model, self.optimizer, self.options.parallel),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "best": self.best,
            "settings": self._settings(),
            "convmixer": info_of(self.preset, self.preset.activation),
        }
        if parallel.rank == 0:
            write_atomically(self.options.output / "last.pt", lambda file: torch.save(state, file))
        parallel.wait()

    def _resume(self) -> None:
        path = self.options.output / "last.pt"
        if not path.exists():
            if self.options.resume:
                self.parallel.tell(f"{path} does not exist yet: this run starts from the beginning")
            return
        if not self.options.resume:
            raise DataError(f"{path} exists: give --resume to go on from it, or another --output")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            before, now = state["settings"], self._settings()
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise DataError(
                f"{path} is not a checkpoint of convmixer.train, or damaged: {images.first_line(error)}"
            ) from error
        changed = [
            f"--{name.replace('_', '-')} {before.get(name)} (now {now[name]})"
            for name in now
            if now[name] != before.get(name)
        ]
        if changed:
            raise DataError(f"{path} was trained with other options: {', '.join(changed)}")
        parallel, kind = self.parallel, self.options.parallel
        parallel.set_state(self.model, state["state_dict"], kind)
        if self.average is not None:
            parallel.set_state(self.average.module, state["state_dict_ema"], kind)
            self.average.n_averaged.fill_(state["averaged"])
        parallel.set_optimizer_state(self.model, self.optimizer, state["optimizer"], kind)
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        parallel.tell(f"resumes after step {self.step} of {self.total}")

    def run(self) -> None:
        while self.step < self.total:
            self._epoch()
        if self.log is not None:
            picture = self.log.draw(f"ConvMixer-{self.preset.dim}/{self.preset.depth}")
            files = ["best.pth", "last.pt", "log.csv", *(["curves.png"] if picture else [])]
            self.progress.line(
                f"best: {self.best:.2f} % of the held-out images; {self.options.output}: {', '.join(files)}"
            )

    def _epoch(self) -> None:
        epoch, first = divmod(self.step, self.steps_an_epoch)
        self.order.epoch, self.order.first = epoch, first
        self.net.train()
        waiting: list[tuple[int, float, Tensor, Tensor]] = []
        started = time.perf_counter()

        def gather() -> list[Row]:
            nonlocal started
            if not waiting:
                return []
            values = torch.stack([torch.stack(entry[2:]) for entry in waiting])  # (steps, 2)
            values[:, 0] = self.parallel.mean(values[:, 0])
            seconds = time.perf_counter() - started
            rate = round(len(waiting) * self.options.batch_size / seconds, 1)
            rows = [
                {"step": step, "epoch": epoch + 1, "loss": loss, "lr": lr, "grad_norm": norm, "images_per_s": rate}
                for (step, lr, *_), (loss, norm) in zip(waiting, values.tolist(), strict=True)
            ]
            wrong = next((row for row in rows if not abs(row["loss"]) < float("inf")), None)
            if wrong is not None:
                raise DataError(
                    f"the loss of step {wrong['step']:.0f} is {wrong['loss']}: give a lower --lr, or --amp bf16 instead of fp16"
                )
            waiting.clear()
            started = time.perf_counter()
            return rows

        for x, labels in self.train_images:
            lr = self.schedule.get_last_lr()[0]
            loss, norm = self._step(x, labels)
            waiting.append((self.step, lr, loss, norm))
            self.progress.step(f"epoch {epoch + 1}/{self.options.epochs}")
            ends = self.step == (epoch + 1) * self.steps_an_epoch
            saves = not ends and self.step % self.options.save_every == 0
            if saves or (not ends and len(waiting) == _STEPS_A_FLUSH):
                rows = gather()
                if self.log is not None:
                    self.log.write(rows)
            if saves:
                self._save()
        self._end_epoch(epoch, gather())

    def _step(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the optimizer: the loss and the norm of the gradients before clipping, on the device."""
        options, parallel = self.options, self.parallel
        images.seed_all(options.seed, "step", self.step, parallel.rank)
        targets: Tensor = labels
        if self.mix is not None:
            x, targets = self.mix(x, labels)
        x, targets = x.to(parallel.device, non_blocking=True), targets.to(parallel.device, non_blocking=True)
        with parallel.autocast(options.amp):
            logits = self.net(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, label_smoothing=options.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad or float("inf"))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step += 1
        full = getattr(norm, "full_tensor", None)  # of FSDP's DTensor
        return loss.detach(), (norm if full is None else full()).detach()

    def _end_epoch(self, epoch: int, rows: list[Row]) -> None:
        tested = self.model if self.average is None else self.average.module
        test = evaluate(tested, self.test_images, self.parallel, self.options.amp)
        if test.top1 > self.best:
            self.best = test.top1
            state = self.parallel.full_state(tested)
            if self.parallel.rank == 0:
                write_state(self.options.output / "best.pth", state, info_of(self.preset, self.preset.activation))
        if self.log is not None:
            if rows:
                rows[-1] |= {"test_loss": test.loss, "test_top1": test.top1, "test_top5": test.top5}
                self.log.write(rows)
            of_epoch = [row["loss"] for row in self.log.rows if row["epoch"] == epoch + 1]
            self.progress.line(
                f"epoch {epoch + 1}/{self.options.epochs}: loss {sum(of_epoch) / len(of_epoch):.4f}, "
                f"held out {test.loss:.4f}, {test.top1:.2f} % right (top five {test.top5:.2f} %), "
                f"{self.progress.rate():.0f} images/s, {self.progress.left()} left"
            )
        self._save()


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    with ExitStack() as stack:
        try:
            parallel = stack.enter_context(Parallel.start(options.device))
            if options.amp == "fp16" and options.parallel == "fsdp" and parallel.world > 1:
                raise DataError("--amp fp16 scales gradients in one process: use --amp bf16 with --parallel fsdp")
            Training(options, parallel, stack).run()
        except DataError as error:
            print(f"error: {images.message(error)}", file=sys.stderr)
            return 2
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"interrupted: --resume goes on from {options.output / 'last.pt'}", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
