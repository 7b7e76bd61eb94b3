"""Reads the code that Triton compiled: registers, instructions, loops, tensor-core work.

Nothing is run: what is read is SASS (``cuobjdump``, which Triton carries), AMD assembly and
Triton's own intermediate code, which holds the shapes of matrix products on every target.
"""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from triton import knobs

# kinds of instructions, the first that an opcode matches; the rest is integers and control
_NVIDIA_KINDS = {
    "tensor": r"[HIQ]?G?MMA|UTC\w*MMA",
    "special": r"MUFU",
    "fp32": r"F(FMA|MUL|ADD|MNMX|SETP|SEL|CHK)|H(FMA|MUL|ADD|MNMX)2",
    "convert": r"F2F|I2F|F2I|I2FP|F2FP|FRND",
    "shared": r"LDS|STS|ATOMS|UTCCP|LDTM|STTM",
    "global": r"LDG|STG|UTMA|UBLKCP|ATOMG|REDG?\b",
    "stack": r"LDL|STL",
    "sync": r"BAR|SYNCS|WARPSYNC|\w*DEPBAR|WARPGROUP|UTCBAR|UTCATOM|FENCE|MEMBAR",
    "exchange": r"SHFL|PRMT|MOVM",
}
_AMD_KINDS = {
    "tensor": r"v_mfma",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "convert": r"v_(cvt|perm)",
    "fp32": r"v_(pk_)?(fma|fmac|mul|add|sub|max|min|max3|cmp_\w+|cndmask)_f(32|16)",
    "shared": r"ds_(read|write|load|store)",
    "global": r"(global|buffer|flat)_",
    "stack": r"scratch_",
    "sync": r"s_(barrier|waitcnt)",
    "exchange": r"ds_(bpermute|permute|swizzle)|v_(readlane|writelane|mov_b32_dpp)",
}


@dataclass(frozen=True)
class Code:
    """What a kernel was compiled to."""

    registers: int  # a thread; on AMD vector registers, accumulation registers included
    stack: int  # bytes a thread
    opcodes: Counter[str]
    loop: Counter[str]  # those of the main loop: the shortest of those with the most products
    macs: int  # multiplications of matrix products in one turn of the main loop, by a block


def kinds(opcodes: Counter[str], target: str) -> Counter[str]:
    """How many instructions there are of each kind."""
    table = _AMD_KINDS if target.startswith("gfx") else _NVIDIA_KINDS
    counts = Counter(dict.fromkeys([*table, "other"], 0))
    for opcode, count in opcodes.items():
        counts[next((kind for kind, how in table.items() if re.match(how, opcode)), "other")] += (
            count
        )
    return counts


@functools.lru_cache(maxsize=512)
def read_nvidia(cubin: bytes, ttgir: str) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    line = r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)([^;]*)"
    found = re.findall(line, text, re.MULTILINE)  # address, predicate, opcode, operands
    places = {int(address, 16): place for place, (address, *_) in enumerate(found)}
    instructions = []
    for _, predicate, opcode, operands in found:
        target, falls = None, True
        if opcode.startswith("BRA"):
            target = places[int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)]
            falls = bool(predicate) or "P" in operands
        elif opcode in ("EXIT", "RET"):
            falls = bool(predicate)
        instructions.append(_Instruction(opcode, target, falls))
    loop = _main(_loops(instructions), _NVIDIA_KINDS)
    opcodes = Counter(x.opcode for x in instructions)
    del opcodes["NOP"]  # padding
    return Code(usage["REG"], usage["STACK"] + usage["LOCAL"], opcodes, loop, _macs(ttgir))


@functools.lru_cache(maxsize=512)
def read_amd(assembly: str, ttgir: str) -> Code:
    usage = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly))
    line = r"^(?:\.(LBB\w+):|\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)(.*))"
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for label, opcode, operands in re.findall(line, assembly, re.MULTILINE):
        if label:
            labels[label] = len(found)
        else:
            found.append((opcode, operands))
    instructions = []
    for opcode, operands in found:
        branch = re.match(r"s_c?branch", opcode) and re.search(r"LBB\w+", operands)
        falls = opcode not in ("s_branch", "s_endpgm")
        instructions.append(_Instruction(opcode, labels[branch[0]] if branch else None, falls))
    return Code(
        int(usage["vgpr_count"]),
        int(usage["private_segment_fixed_size"]),
        Counter(opcode for opcode, _ in found),
        _main(_loops(instructions), _AMD_KINDS),
        _macs(ttgir),
    )


class _Instruction(NamedTuple):
    opcode: str
    target: int | None  # where it may jump
    falls: bool  # whether the next one may follow


def _loops(code: list[_Instruction]) -> Iterator[Counter[str]]:
    """The natural loops: a jump back to what all ways to it lead through, and what lies between.

    Code that waits is often placed at the end, and its jump back is none.
    """
    targets = (x.target for x in code if x.target is not None)
    after = (i + 1 for i, x in enumerate(code) if x.target is not None or not x.falls)
    firsts = sorted({0, *targets, *after} & set(range(len(code))))
    bounds = list(itertools.pairwise([*firsts, len(code)]))
    block_at = {first: block for block, first in enumerate(firsts)}
    ways = [
        [
            block_at[x]
            for x in (code[end - 1].target, end if code[end - 1].falls else None)
            if x in block_at
        ]
        for _, end in bounds
    ]
    origins: list[list[int]] = [[] for _ in bounds]
    reached, waiting = set(), [0]
    while waiting:
        if (block := waiting.pop()) not in reached:
            reached.add(block)
            waiting += ways[block]
            for successor in ways[block]:
                origins[successor].append(block)

    dominators = [{0}, *({*range(len(bounds))} for _ in bounds[1:])]
    changed = True
    while changed:
        changed = False
        for block in reached - {0}:
            found = {block} | set.intersection(*(dominators[x] for x in origins[block]))
            changed |= found != dominators[block]
            dominators[block] = found

    for block in reached:
        for head in dominators[block].intersection(ways[block]):
            body, waiting = {head}, [block]
            while waiting:
                if (inside := waiting.pop()) not in body:
                    body.add(inside)
                    waiting += origins[inside]
            yield Counter(x.opcode for b in body for x in code[slice(*bounds[b])])


def _main(loops: Iterable[Counter[str]], table: dict[str, str]) -> Counter[str]:
    """The loop that does the work: of those with most products, or most loads, the shortest."""

    def work(loop: Counter[str]) -> tuple[int, int, int]:
        tensor, memory = (
            sum(n for opcode, n in loop.items() if re.match(table[kind], opcode))
            for kind in ("tensor", "global")
        )
        return tensor, memory, -loop.total()

    return max(loops, key=work, default=Counter())


def _macs(ttgir: str) -> int:
    """Of the innermost loops the most multiplications of matrix products in one turn."""
    return max((sum(m * n * k for m, n, k in dots) for dots in _products(ttgir)), default=0)


def _products(ttgir: str) -> Iterator[list[tuple[int, int, int]]]:
    """For each loop the products right inside it, ``[m, k] @ [k, n]``."""
    loops: list[tuple[str, list[tuple[int, int, int]]]] = []
    for line in ttgir.splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append((indent, []))
        elif loops and line.startswith(loops[-1][0] + "}") and " do {" not in line:
            yield loops.pop()[1]
        elif loops and re.search(r"\b(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) ", line):
            shapes = re.findall(r"(?:tensor|memdesc)<(?:1x)?(\d+)x(\d+)x[a-z]\w*,", line)
            (m, k), (_, n) = ((int(a), int(b)) for a, b in shapes[:2])
            loops[-1][1].append((m, n, k))
