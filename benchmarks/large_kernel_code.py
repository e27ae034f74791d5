"""The machine code of the large kernels' Triton programs on a Hopper GPU, which need not be there: Triton assembles it.

    python benchmarks/large_kernel_code.py

For every form at SLaK's stages, which the first call on a GPU times: registers, spilled bytes, shared memory, the
instructions of a warp before and within the loop over images, and the least times in ms that a forward of 64 images
takes on an H200 (132 multiprocessors at 1.83 GHz): to issue them (four schedulers, one instruction a cycle each), to
pass what they read and write through the first-level cache and shared memory (128 bytes a cycle), and those of the
traffic and of the products on tensor cores, padded to the tile. What is measured on a GPU can only be more:
benchmarks/large_kernel.py.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.config import run_command
from zoo.errors import ConfigError

BATCH = 64
STAGES = {56: (124, 51), 28: (249, 49), 14: (499, 27), 7: (998, 13)}  # side: channels, taps that meet the map
TYPES = {"fp32": 1, "bf16": 0}  # and 16-bit products for one of theirs
MULTIPROCESSORS, HERTZ, BYTES_PER_S = 132, 1.83e9, 4.8e12
FLOPS = 2 * 2048 * MULTIPROCESSORS * HERTZ  # of 16-bit tensor cores


def assembled(
    program: Any,
    tensors: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    warps: int = 4,
    stages: int = 1,
    registers: int | None = None,
) -> tuple[int, str, bytes]:
    """(shared memory in bytes, PTX, machine code) of a program compiled for a GPU that need not be there.

    `tensors` names the arguments that are tensors, and their types; what is not in `constants` either is an integer.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = program if hasattr(program, "params") else program.fn
    names = function.arg_names
    signature = {name: "*" + tensors[name] if name in tensors else "constexpr" for name in names}
    signature |= {name: "i32" for name in names if name not in tensors and name not in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in tensors}
    source = ASTSource(function, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return kernel.metadata.shared, kernel.asm["ptx"], kernel.asm["cubin"]


def laid_out(name: str, height: int, width: int) -> dict[str, int]:
    """A contiguous kernel's strides."""
    return {f"{name}CHANNEL": height * width, f"{name}ROW": width}


def programs_at(
    size: int, tap: int, dtype: str, products: int, lines: int = 5
) -> Iterator[tuple[Any, dict[str, str], dict[str, Any], int, int, int | None]]:
    """Every program that a map of size x size runs, with its forms.

    (program, tensors, constants, warps, stages, registers)
    """
    from zoo.layers import large_kernel_programs as programs
    from zoo.layers.large_kernel_triton import _can_hold

    weight = {"x": dtype, "gradient": dtype, "out": "fp32"}
    short = min(64, 1 << (size - 1).bit_length())
    constants: dict[str, Any]
    precision = "tf32x3" if products == 3 else "tf32"
    for height, width in ((tap, lines), (lines, tap)):
        if size * size <= programs.BLOCK_POSITIONS:
            constants = {"MAP_H": size, "MAP_W": size, "IMAGES": 64, "PLACES": 64, "PRECISION": precision}
            constants |= {"KERNEL_H": height, "KERNEL_W": width, **laid_out("", height, width)}
            yield programs.map_weight_program, weight, constants, 4, 1, None
            continue
        constants = {"ALIGN": size & -size, "WIDE": height < width, "TAPS": tap, "LINES": lines}
        constants |= {"LONG": max(16, short), "SHORT": short, "IMAGES": 64 // short, "PRECISION": precision}
        constants |= {"REPEATS": True, **laid_out("", height, width)}
        for config in programs._WEIGHT_CONFIGS:
            yield programs.weight_program, weight, constants, config.num_warps, config.num_stages, None
    edges: dict[str, Any] = {"TALL_H": tap, "TALL_W": lines, "WIDE_H": lines, "WIDE_W": tap}
    edges |= {"SMALL_H": lines, "SMALL_W": lines, "TURNED": False, "HAS_BIAS": True, "PRODUCTS": products}
    for name, height, width in (("TALL_", tap, lines), ("WIDE_", lines, tap), ("SMALL_", lines, lines)):
        edges |= laid_out(name, height, width)
    tensors = dict.fromkeys(("x", "bias", "y"), dtype) | dict.fromkeys(("tall", "wide", "small"), "fp32")
    edge = max(16, short)
    held = _can_hold((lines, lines), (edge, edge), products)
    if size * size <= (programs.POSITIONS if products < 3 and not held else programs.BLOCK_POSITIONS):
        blocks = 1 if size <= 8 else 4
        del edges["PRODUCTS"]
        edges |= {
            "PRECISION": "tf32x3" if products == 3 else "tf32",
            "MAP_H": size,
            "MAP_W": size,
            "IMAGES": 64,
            "BLOCK": 64,
            "BLOCKS": blocks,
        }
        yield programs.map_program, tensors, edges, 4, 3, None if blocks > 1 else 128 if products else 96
        return
    if not held:
        laid = "fp16" if products else dtype
        made = {"kernel": "fp32", "matrices": laid, "unscales": "fp32"}
        for height, width in ((tap, lines), (lines, tap)):
            constants = {"HEIGHT": height, "WIDTH": width, "LONG": edge, "STRIP": 1, "PRODUCTS": products}
            constants |= {"WIDE": height < width, "TURNED": False, **laid_out("", height, width)}
            yield programs.matrix_program, made, constants, 4, 1, None
        tensors |= dict.fromkeys(("tall", "wide"), laid)
        edges |= {"SMALL_H": 0, "SMALL_W": 0}
    tensors |= dict.fromkeys(("tall_unscale", "wide_unscale"), "fp32")
    tensors["copies"] = "fp16" if products else dtype
    edges |= {"ALIGN": size & -size, "MAX_IMAGES": 16, "TILE_H": edge, "TILE_W": edge, "STRIP_H": 1, "STRIP_W": 1}
    for config in programs._CONFIGS:
        constants = edges | {"HELD": held, **config.kwargs}
        yield programs.band_program, tensors, constants, config.num_warps, 1, config.maxnreg


def near_bytes(instruction: str) -> int:
    """What a warp's instruction passes through the first-level cache or shared memory, without conflicts of banks."""
    name, *parts = re.sub(r"^@!?U?P\w+ +", "", instruction).split()[0].split(".")
    if name in ("LDG", "STG", "LDS", "STS", "SHFL"):
        return 32 * (16 if "128" in parts else 8 if "64" in parts else 4)
    if name in ("LDSM", "STSM"):
        return 128 * int(parts[-1] if parts[-1] in "124" else 1)
    if name == "HGMMA":  # of four warps: the right operand lies in shared memory, the left one there or in registers
        rows, columns, depth = (int(size) for size in parts[0].split("x"))
        shared = columns + (rows if re.search(r"HGMMA\S+ R\d+, gdesc", instruction) else 0)
        return shared * depth * (2 if depth == 16 else 4) // 4
    return 0


def instructions(cubin: bytes) -> dict[str, int]:
    """What the disassembler counts: registers, bytes on the stack, and before and within the loop instructions, and
    bytes that they pass (`near_bytes`)."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.cubin"
        path.write_bytes(cubin)
        run = [subprocess.run([tools / tool, option, path], capture_output=True, text=True) for tool, option in (
            ("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))]  # fmt: skip
    usage = re.search(r"REG:(\d+) STACK:(\d+)", run[0].stdout + run[0].stderr)
    if usage is None or run[1].returncode:
        raise ConfigError(f"Triton's disassembler could not read its own code: {run[0].stderr}{run[1].stderr}")
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in run[1].stdout.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(instruction[1])
    loop = (len(lines), len(lines))
    for end, line in enumerate(lines):
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        start = labels.get(jump[1], end) if jump else end
        if end - start > loop[1] - loop[0] and any("MMA" in inside for inside in lines[start:end]):
            loop = (start, end)
    inside = lines[slice(*loop)]
    near, near_inside = (sum(map(near_bytes, some)) for some in (lines, inside))
    return {
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "before": len(lines) - len(inside),
        "inside": len(inside),
        "near_before": near - near_inside,
        "near_inside": near_inside,
    }


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from zoo.layers import large_kernel_programs as large
    from zoo.layers.large_kernel_triton import _slots

    print(
        "| map, type | form | registers, spilled | shared KiB | instructions: once, a tile | issue | near | bytes",
        end="",
    )
    print(" | products |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for size, (channels, tap) in STAGES.items():
        for dtype, products in TYPES.items():
            map_bytes = BATCH * channels * size**2 * (4 if dtype == "fp32" else 2)
            for program, tensors, constants, warps, stages, registers in programs_at(size, tap, dtype, products):
                if program not in (large.band_program, large.map_program):
                    continue
                shared, _, cubin = assembled(program, tensors, constants, 90, warps, stages, registers)
                found = instructions(cubin)
                if "BLOCKS" in constants:  # all positions with all, and TF32 at half the rate
                    images, tile, repeats = (
                        constants["IMAGES"],
                        constants["BLOCK"] * constants["BLOCKS"],
                        constants["BLOCKS"],
                    )
                    taps = tile * (2 if dtype == "fp32" else 1)
                else:
                    edge, repeats = constants["TILE_H"], 1
                    images = large.images_of(constants["TILE"], edge, edge, constants["MAX_IMAGES"], warps)
                    tile, taps = edge**2, edge * (constants["TALL_W"] + constants["WIDE_H"])
                groups = -(-BATCH // images)
                lines = constants["TALL_W"], constants["WIDE_H"]
                slots = _slots(MULTIPROCESSORS, lines, (constants.get("TILE_H", 0), constants.get("TILE_W", 0)))
                made = channels * min(groups, max(1, slots // channels))
                issued, near = (
                    warps * (made * found[f"{what}before"] + channels * groups * repeats * found[f"{what}inside"])
                    for what in ("", "near_")
                )
                multiplied = 2 * channels * groups * images * tile * taps
                form = f"{images} images, {warps} warps"
                cycles = MULTIPROCESSORS * HERTZ
                times = issued / 4 / cycles, near / 128 / cycles, 2 * map_bytes / BYTES_PER_S, multiplied / FLOPS
                print(
                    f"| {channels} x {size}x{size}, {dtype} | {form} | {found['registers']}, {found['stack']} "
                    f"| {shared / 1024:.0f} | {found['before']}, {found['inside']} "
                    f"| {' | '.join(f'{1e3 * seconds:.3f}' for seconds in times)} |",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(run_command(main))
