# SPDX-License-Identifier: MIT
"""What ptxas made of the CUDA kernels: registers, memory and instructions, read from a built module; needs no GPU.

cuobjdump and nvdisasm come from PATH, from nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, or from Triton's wheel.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


def find_tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm, or None."""
    if on_path := shutil.which(name):
        return Path(on_path)
    folders = []
    for package, below in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        folders += [Path(root) / below for root in (spec.submodule_search_locations or [])] if spec else []
    return next((folder / name for folder in folders if os.access(folder / name, os.X_OK)), None)


def missing_tool() -> str | None:
    """Why nothing can be disassembled here, or None."""
    missing = [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]
    return f"{' and '.join(missing)} not found: pip install triton" if missing else None


def _dump(module: Path, *options: str) -> Iterator[str]:
    disassembler = find_tool("nvdisasm").parent
    environment = os.environ | {"PATH": f"{disassembler}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [str(find_tool("cuobjdump")), *options, str(module)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield from process.stdout
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture. `stack` holds spilled registers and indexed arrays: local memory."""

    architecture: str
    function: str
    registers: int
    stack: int
    shared: int
    local: int


def parse_resources(lines: Iterable[str]) -> list[Resources]:
    """Of `cuobjdump --dump-resource-usage`.

    Raises:
        ValueError: a function without its line of figures.
    """
    found, architecture, function = [], "", None
    for line in lines:
        if match := re.search(r"arch = (\w+)", line):
            architecture = match.group(1)
        elif match := re.search(r"Function (\S+):", line):
            function = match.group(1)
        elif "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            if function is None or not {"REG", "STACK", "SHARED", "LOCAL"} <= values.keys():
                raise ValueError(f"resource usage of no function, or without figures: {line.strip()}")
            four = (values[key] for key in ("REG", "STACK", "SHARED", "LOCAL"))
            found.append(Resources(architecture, function, *four))
            function = None
    if function is not None:
        raise ValueError(f"no resource usage of {function}")
    return found


def resources(module: Path) -> list[Resources]:
    """Of every kernel of a module, for every architecture in it."""
    return parse_resources(_dump(module, "--dump-resource-usage"))


def in_local_memory(found: Iterable[Resources]) -> list[str]:
    """The kernels that spill registers or keep arrays in local memory."""
    return [f"{r.function} on {r.architecture}: {r.stack + r.local} bytes" for r in found if r.stack or r.local]


def blocks_per_multiprocessor(registers: int, threads: int, shared: int, architecture: str) -> int:
    """Blocks that fit at once: 65536 registers in units of 256 a warp, shared memory with 1 KB of each block's own, threads."""
    memory, most_threads = {"sm_80": (164, 2048), "sm_90": (228, 2048)}[architecture.rstrip("a")]
    warps = -(-threads // 32)
    a_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // a_warp // warps
    by_shared = (memory << 10) // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, most_threads // (32 * warps), 32)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: `@P0 BRA 0x90` has the name BRA, is conditional and has the target 0x90."""

    address: int
    text: str

    @property
    def conditional(self) -> bool:
        # a branch may also have a predicate as its first operand, or ask whether the warp is together
        return self.text.startswith("@") or re.search(r"BRA(\.\w+)* !?U?P\w+,|BRA\.(DIV|CONV)", self.text) is not None

    @property
    def name(self) -> str:
        return re.sub(r"^@!?\w+\s+", "", self.text).split()[0]

    @property
    def target(self) -> int | None:
        # a call that is conditional leaves a loop and does not return (sm_80)
        match = re.search(r"(?:\bBRA\b|^@!?\w+ CALL\b).*?(0x[0-9a-f]+)\s*$", self.text)
        return int(match.group(1), 16) if match else None


@dataclass
class Block:
    """Instructions that run one after the other; `successors` are indices of blocks."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)

    @cached_property
    def counts(self) -> Counter[str]:
        """By the name up to its first dot, and by classes of 16-byte and special instructions."""
        counts: Counter[str] = Counter()
        for name, never in ((i.name, i.text.startswith("@!PT ")) for i in self.instructions if i.name != "NOP"):
            counts["all"] += 1
            if never:
                # ptxas pads LDGSTS so; an issue slot and nothing else
                continue
            counts[name.split(".")[0]] += 1
            base, *modifiers = name.split(".")
            for width in ("64", "128"):
                if base in ("LDG", "STG", "LDS", "STS", "LDGSTS") and width in modifiers:
                    counts[f"{base}.{width}"] += 1
            if base == "LDSM":
                # matrices: LDSM.16.M88 is one, .2 and .4 as they say
                counts[f"LDSM.x{modifiers[-1] if modifiers[-1] in '24' else 1}"] += 1
            if name.startswith(("MUFU.EX2", "MUFU.RCP", "HMMA.16816", "HMMA.1688")):
                counts[".".join(name.split(".")[:2])] += 1
        return counts


@dataclass
class Loop:
    """A natural loop: block indices, and the loops directly inside."""

    header: int
    blocks: set[int]
    inner: list[Loop] = field(default_factory=list)


@dataclass
class Kernel:
    """A kernel's basic blocks in the order of their addresses."""

    architecture: str
    function: str
    blocks: list[Block]

    @cached_property
    def counts(self) -> Counter[str]:
        return sum((block.counts for block in self.blocks), Counter())

    @cached_property
    def loops(self) -> list[Loop]:
        """The outermost loops, in the order of their addresses."""
        dominators = self._dominators()
        found: dict[int, set[int]] = {}
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for i, block in enumerate(self.blocks):
            for s in block.successors:
                predecessors[s].append(i)
        for i, block in enumerate(self.blocks):
            for header in block.successors:
                if header in dominators[i]:
                    body, stack = {header}, [i]
                    while stack:
                        j = stack.pop()
                        if j not in body:
                            body.add(j)
                            stack += predecessors[j]
                    found.setdefault(header, set()).update(body)
        loops = sorted((Loop(h, b) for h, b in found.items()), key=lambda loop: len(loop.blocks))
        outermost = []
        for i, loop in enumerate(loops):
            parent = next((other for other in loops[i + 1 :] if loop.header in other.blocks), None)
            (outermost if parent is None else parent.inner).append(loop)
        for loop in loops:
            loop.inner.sort(key=lambda inner: inner.header)
        return sorted(outermost, key=lambda loop: loop.header)

    @cached_property
    def whole(self) -> Loop:
        """The kernel as one iteration of a loop, for once_through."""
        return Loop(0, set(range(len(self.blocks))), self.loops)

    def _dominators(self) -> list[set[int]]:
        reachable, stack = {0}, [0]
        while stack:
            for s in self.blocks[stack.pop()].successors:
                if s not in reachable:
                    reachable.add(s)
                    stack.append(s)
        everything = set(reachable)
        # what nothing reaches (a detour of warps that are not together) is dominated by nothing, or it would close loops
        dominators = [{0} if i == 0 else set(everything if i in reachable else ()) for i in range(len(self.blocks))]
        predecessors: list[list[int]] = [[] for _ in self.blocks]
        for i in reachable:
            for s in self.blocks[i].successors:
                predecessors[s].append(i)
        changed = True
        while changed:
            changed = False
            for i in sorted(reachable - {0}):
                new = {i} | set.intersection(*(dominators[p] for p in predecessors[i]))
                if new != dominators[i]:
                    dominators[i], changed = new, True
        return dominators

    def all_loops(self) -> Iterator[Loop]:
        """Every loop, the outer before the inner."""
        stack = list(reversed(self.loops))
        while stack:
            loop = stack.pop()
            yield loop
            stack += reversed(loop.inner)

    def once_through(
        self,
        loop: Loop,
        prefer: Callable[[Counter[str]], tuple[int, ...]],
        avoid: Callable[[Counter[str]], bool] = lambda counts: False,
        through: Loop | None = None,
    ) -> Counter[str]:
        """Instructions of the path through one iteration that has the most of what `prefer` counts, then the fewest in all.

        Inner loops count as nothing, except that the path must meet `through`. Blocks that `avoid` names are not taken.
        """
        inside = {b: inner for inner in loop.inner for b in inner.blocks}

        def node(b: int) -> int:
            return inside[b].header if b in inside else b

        order, seen = [], set()

        def successors(b: int) -> set[int]:
            blocks = inside[b].blocks if b in inside else {b}
            out = {node(s) for i in blocks for s in self.blocks[i].successors if s in loop.blocks}
            return {s for s in out if s != b and s != loop.header}

        def visit(start: int) -> None:
            stack = [(start, iter(sorted(successors(start))))]
            seen.add(start)
            while stack:
                b, more = stack[-1]
                following = next((s for s in more if s not in seen), None)
                if following is None:
                    order.append(b)
                    stack.pop()
                else:
                    seen.add(following)
                    stack.append((following, iter(sorted(successors(following)))))

        visit(loop.header)
        best: dict[int, tuple[tuple[int, ...], Counter[str]]] = {}
        for b in order:
            own = Counter() if b in inside else self.blocks[b].counts
            if b not in inside and avoid(own):
                continue
            blocks = inside[b].blocks if b in inside else {b}
            ends = any(loop.header in self.blocks[i].successors for i in blocks)
            ends = ends or (loop is self.whole and self.blocks[b].instructions[-1].name == "EXIT")
            choices = [best[s] for s in successors(b) if s in best]
            if ends:
                choices.append(((0,) * (len(prefer(own)) + 2), Counter()))
            if not choices:
                continue
            rank, rest = max(choices, key=lambda choice: choice[0])
            met = int(through is not None and b in inside and inside[b] is through)
            gained = (met, *prefer(own), -own["all"])
            best[b] = (tuple(map(sum, zip(rank, gained, strict=True))), own + rest)
        if loop.header not in best:
            raise ValueError(f"{self.function}: every way through the loop is to be avoided")
        return best[loop.header][1]


def _blocks(instructions: list[Instruction]) -> list[Block]:
    addresses = {instruction.address for instruction in instructions}
    leaders = {instructions[0].address} if instructions else set()
    for now, following in zip(instructions, [*instructions[1:], None], strict=True):
        if now.target is not None or now.name.startswith(("EXIT", "RET", "BRX", "JMP")):
            leaders |= {now.target} & addresses
            leaders |= {following.address} if following else set()
    blocks: list[Block] = []
    for instruction in instructions:
        if instruction.address in leaders:
            blocks.append(Block([]))
        blocks[-1].instructions.append(instruction)
    at = {block.instructions[0].address: i for i, block in enumerate(blocks)}
    for i, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.target in at:
            block.successors.append(at[last.target])
        ends = last.name.startswith(("EXIT", "RET")) or last.target is not None
        if (not ends or last.conditional) and not last.name.startswith("BRX") and i + 1 < len(blocks):
            block.successors.append(i + 1)
    # an indirect branch (the jump table of a switch): to what follows and is reached in no other way
    reached = {0} | {s for block in blocks for s in block.successors}
    for i, block in enumerate(blocks):
        if block.instructions[-1].name.startswith("BRX"):
            further = (j for j in range(i + 1, len(blocks)) if blocks[j].instructions[-1].name.startswith("BRX"))
            # up to where the cases meet again
            join, last = len(blocks), next(further, len(blocks) - 1)
            for j in range(i + 1, last + 1):
                if j >= join:
                    break
                if j not in reached:
                    block.successors.append(j)
                end = blocks[j].instructions[-1]
                if end.name == "BRA" and not end.conditional and at.get(end.target, 0) > j:
                    join = at[end.target] if join == len(blocks) else max(join, at[end.target])
    return blocks


def parse_sass(lines: Iterable[str], wanted: Callable[[str], bool] = lambda function: True) -> Iterator[Kernel]:
    """Of `cuobjdump -sass`: the functions whose mangled name is `wanted`."""
    architecture, function, instructions = "", None, []
    line_of_code = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;")
    for line in lines:
        match = line_of_code.match(line) if function is not None else None
        if match:
            instructions.append(Instruction(int(match.group(1), 16), match.group(2)))
            continue
        if "Function :" not in line and "arch = " not in line:
            continue
        if function is not None:
            yield Kernel(architecture, function, _blocks(instructions))
        function, instructions = None, []
        if match := re.search(r"arch = (\w+)", line):
            architecture = match.group(1)
        elif wanted(name := line.split()[-1]):
            function = name
    if function is not None:
        yield Kernel(architecture, function, _blocks(instructions))


def kernels(module: Path, architecture: str, wanted: Callable[[str], bool] = lambda function: True) -> Iterator[Kernel]:
    """The kernels of a module for one architecture ("sm_90a")."""
    return parse_sass(_dump(module, "-sass", "-arch", architecture), wanted)
