"""What Triton's compiler makes of the GPU's kernels, on a machine that needs no GPU.

    python benchmarks/gpu_code.py [--capability 90] [--shape llama-8b] [--preset balanced ...] [--json]

A line is a block of a preset: the registers of the kernel that attends to all blocks, how often it moves some to and
from memory in a tile of tokens and in all its code, the shared memory of a program, and the instructions that its warps
take for a tile. Large batches take as long as these.
All other kernels are compiled as well. Capabilities: 80 (A100), 86, 89 (RTX 4090), 90 (H100), 100 (B200).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import crushkv.compiled
from crushkv import CrushConfig
from crushkv.kernels import gpu
from crushkv.kernels.gpu_code import KIND, KIND_BITS
from crushkv.kernels.gpu_prepared import prepared
from crushkv.presets import PRESETS
from crushkv.rope import Rope
from crushkv.storage import TieredStorage
from gpu_kernels import SHAPES, Layer, packed
from gpu_report import console

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
LABEL = re.compile(r"^(\.L_x_\d+):")
WAIT = 16  # instructions of a loop that waits, at most
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class NoGpu:
    """Stands for the driver of a GPU that code is made for, and that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiled:
    """The kernels that were to be launched since `clear`, with their compile-time arguments."""

    def __init__(self, capability: int) -> None:
        self.kernels: list[tuple[str, dict[str, Any], Any]] = []
        driver.set_active(NoGpu(capability))

        def launcher(kernel: JITFunction[Any], grid: Any) -> Any:
            def compiles(*args: Any, **kwargs: Any) -> None:
                self.kernels.append((kernel.__name__, kwargs, kernel.warmup(*args, grid=grid, **kwargs)))

            return compiles

        JITFunction.__getitem__ = launcher

    def clear(self) -> list[tuple[str, dict[str, Any], Any]]:
        found, self.kernels = self.kernels, []
        return found


def disassembled(kernel: Any) -> tuple[int, list[tuple[str, str]], dict[str, int]]:
    """Registers, instructions with their operands, and where labels stand."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([str(TOOLS / tool[0]), *tool[1:], file.name], capture_output=True, text=True, check=True)
            for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    code, labels = list[tuple[str, str]](), dict[str, int]()
    for line in text.stdout.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.search(line):
            code.append((instruction[1], instruction[2]))
    registers = re.search(r"REG:(\d+)", usage.stdout)
    assert registers is not None and code
    return int(registers[1]), code, labels


def loops(code: list[tuple[str, str]], labels: dict[str, int]) -> list[tuple[int, int]]:
    """First and last instructions of the loops in the order of their ends, but for those that wait for something."""
    found = []
    for i, (name, operands) in enumerate(code):
        target = TARGET.search(operands) if name.startswith("BRA") else None
        if target and (begin := labels.get(target[1], i + 1)) < i - WAIT:
            found.append((begin, i))
    return found


def spilled(code: list[tuple[str, str]]) -> int:
    """How often registers are moved to and from memory."""
    return sum(name[:3] in ("LDL", "STL") for name, _ in code)


def columns_at(store: TieredStorage) -> range:
    """Places of N among the numbers of KINDS, see `crushkv.kernels.gpu_code`."""
    return range(KIND.index("N"), len(KIND) * (len(store.blocks) + 1), len(KIND))


def attention(kernel: Any, arguments: dict[str, Any], store: TieredStorage) -> Iterator[dict[str, Any]]:
    """Of the kernel that attends to all that is held: one program's instructions for a tile of each block."""
    registers, code, labels = disassembled(kernel)
    found = loops(code, labels)
    tiles = [(a, b) for a, b in found if not any(c < a and b < d for c, d in found)]
    known = len(tiles) == len(store.blocks) + 1  # the last one is over what is not packed
    made = prepared(store)
    assert made is not None
    columns = max(arguments["KINDS"] >> (KIND_BITS * place) & (2**KIND_BITS - 1) for place in columns_at(store))
    for number, (keys, values) in enumerate(store.blocks):
        row: dict[str, Any] = {"keys": keys.bits, "values": values.bits}
        planes = list[float]()
        if number in made.slots:  # a loop for each plane of channels, of 4, 2 and 1 bits
            row["keys"] = "by channel"
            turns = (made.slots[number].lines[:, :, 1] / torch.tensor([4, 2, 1]) / arguments["ROWS"]).ceil()
            planes = turns.mean(0).tolist()
        instructions, spills = None, spilled(code)
        if known:
            begin, end = tiles[number]
            sizes = [b - a + 1 for a, b in found if begin < a and b < end]
            if len(sizes) == len(planes):
                tile = end - begin + 1 - sum(sizes) + sum(map(math.prod, zip(sizes, planes, strict=True)))
                instructions, spills = round(tile), spilled(code[begin : end + 1])
        yield row | {
            "columns": columns,
            "registers": registers,
            "spills": spills,
            "in all": spilled(code),
            "KiB": kernel.metadata.shared / 2**10,
            "instructions": instructions,  # None: a B200 waits outside of the loops
        }


Tensors = tuple[Tensor, Tensor, Tensor, Rope]


def layer_of(shape: str) -> Tensors:
    """Queries, keys and values in bfloat16, and how the keys are turned."""
    layer = Layer(*SHAPES[shape], tokens=2048, batch=1)
    queries, keys, values, rope = layer.tensors(torch.device("cpu"))
    return queries.bfloat16(), keys.bfloat16(), values.bfloat16(), rope


def preset_rows(compiled: Compiled, layer: Tensors, presets: list[str]) -> Iterator[dict[str, Any]]:
    queries, keys, values, rope = layer
    _, heads, _, size = keys.shape
    groups = tuple(range(heads // 2)), tuple(range(heads // 2, heads))
    for name in presets:
        config = CrushConfig.preset(name)
        whole = packed(keys, values, rope, config)
        parts = [packed(keys[:, list(group)], values[:, list(group)], rope, config) for group in groups]
        compiled.clear()
        gpu.attend(queries, whole, size**-0.5, None)
        assert gpu.attend_together(queries, parts, groups, size**-0.5) is not None
        for new in range(2):  # the first one needs room
            assert gpu.append(keys[:, :, :1], values[:, :, :1], parts, groups) == (new > 0)
            for part, group in zip(parts, groups, strict=True):
                part.append(keys[:, list(group), :1], values[:, list(group), :1])
        for kernel, arguments, made in compiled.clear():
            if kernel == "attend_everywhere":
                together = arguments["groups"] > 1
                for row in attention(made, arguments, whole if not together else parts[0]):
                    yield {"preset": name, "together": together, **row}


def compile_the_others(compiled: Compiled, layer: Tensors, presets: list[str]) -> set[str]:
    """Compiles what quantizes and packs, whose results are nothing here, and rare forms. Names of the kernels."""
    queries, keys, values, rope = layer
    module = crushkv.compiled._module
    crushkv.compiled._module = lambda subject, device: importlib.import_module(f"crushkv.compiled.gpu_{subject}")
    try:
        for name in presets:
            packed(keys, values, rope, CrushConfig.preset(name))
    finally:
        crushkv.compiled._module = module
    for name in presets[:1]:  # a padded batch, and blocks of a number of tokens that does not divide by 8
        store = packed(keys[:, :, 3:], values[:, :, 3:], rope, CrushConfig(**PRESETS[name], page_size=1))
        gpu.attend(queries, store, 1.0, torch.ones(1, 1, store.length, dtype=torch.bool))
    return {name for name, _, _ in compiled.clear()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--json", action="store_true", help="print lines of JSON")
    given = parser.parse_args()
    compiled, layer = Compiled(given.capability), layer_of(given.shape)
    others = compile_the_others(compiled, layer, given.preset)
    rows = list(preset_rows(compiled, layer, given.preset))
    if given.json:
        return print(json.dumps({"triton": triton.__version__, "others": sorted(others), "rows": rows}))
    table = Table(*(name for name in rows[0]))
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    print(f"Triton {triton.__version__}, capability {given.capability}; compiled besides: {', '.join(sorted(others))}")


if __name__ == "__main__":
    main()
