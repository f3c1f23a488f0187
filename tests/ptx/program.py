"""Reads PTX: the statements of a kernel in their order, and how it is launched."""

import dataclasses
import re
from pathlib import Path

_GUARD = re.compile(r"@(!?)([%\w]+)\s+")
_LABEL = re.compile(r"([\w$]+):(?!:)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One statement.

    Attributes:
      opcode: with its modifiers, "ld.global.v2.b32".
      operands: as written: "%r1", "{%r1, %r2}", "[%rd1+4]", "%r7|%p3", "0f3F800000".
      guard: (predicate, whether it must be false), or None.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"


@dataclasses.dataclass(frozen=True)
class Program:
    """Attributes:
    name: of its function; parameters: theirs in their order.
    instructions: statements; labels: name → index of the statement behind it.
    """

    name: str
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Launch:
    """Attributes:
    grid: thread blocks along x, y, z; threads: of one.
    shared_bytes: dynamic shared memory of a block.
    arguments: for each parameter the position of the array among the kernel's operands and results.
    """

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[int, ...]


def parse(text: str) -> Program:
    """The one kernel of a PTX file."""
    text = re.sub(r"//[^\n]*", "", text)
    head = re.search(r"\.entry (\w+)\((.*?)\)", text, re.DOTALL)
    parameters = tuple(re.findall(r"(\w+_param_\d+)", head[2]))
    body = text[text.index("{", head.end()) + 1 :]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    scopes, opened, at = [""], 0, 0
    while True:
        at += len(body[at:]) - len(body[at:].lstrip())
        if body[at] == "{":
            opened += 1
            scopes.append(f"@{opened}")
            at += 1
        elif body[at] == "}":
            scopes.pop()
            at += 1
            if not scopes:
                return Program(head[1], parameters, tuple(instructions), labels)
        elif label := _LABEL.match(body, at):
            labels[label[1] + scopes[-1]] = len(instructions)
            at = label.end()
        elif body[at] == ".":
            at = _end_of_directive(body, at)
        else:
            end = body.index(";", at)
            instructions.append(_instruction(body[at:end], scopes[-1]))
            at = end + 1


def _end_of_directive(body: str, at: int) -> int:
    line, statement = body.index("\n", at), body.find(";", at)
    # `.loc` ends with its line, a declaration with a semicolon that may be followed by more on the same line.
    return line if body.startswith((".loc", ".file"), at) or statement < 0 else statement + 1


def _instruction(text: str, scope: str) -> Instruction:
    guard = _GUARD.match(text)
    text = text[guard.end() :] if guard else text
    opcode, _, rest = text.strip().partition(" ") if " " in text.strip() else (text.strip(), "", "")
    opcode, tab, more = opcode.partition("\t")
    rest = more + rest if tab else rest
    operands = tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest) if part.strip())
    if opcode.startswith("bra"):
        operands = tuple(name if name.startswith("$") else name + scope for name in operands)
    return Instruction(opcode, operands, (guard[2], guard[1] == "!") if guard else None)


def launch(layout: str) -> Launch:
    """How Mosaic launches a kernel, from its module after layout inference (`*.after_layout_inference.txt`).

    Parameters come in the order in which the kernel's body names them first.
    """
    found = re.search(
        r"gpu\.launch .*? in \(([^)]*)\) threads\([^)]*\) in \(([^)]*)\) dynamic_shared_memory_size (%\S+) \{", layout
    )
    grid, block = (
        tuple(_constant(layout, name) for name in re.findall(r"= (%[\w-]+)", each)) for each in found.groups()[:2]
    )
    arrays = {
        name: int(index)
        for name, index in re.findall(
            r"(%\d+) = builtin\.unrealized_conversion_cast .*?from_kernel_arg_idx = (\d+)", layout
        )
    }
    named = [name for name in re.findall(r"%\d+\b", layout[found.end() :]) if name in arrays]
    return Launch(grid, block[0], _constant(layout, found[3]), tuple(arrays[name] for name in dict.fromkeys(named)))


def _constant(layout: str, name: str) -> int:
    return int(re.search(rf"{re.escape(name)} = arith\.constant (\d+) :", layout)[1])


def read(folder: Path) -> tuple[Program, Launch]:
    """The one kernel that Mosaic has left in a folder (MOSAIC_GPU_DUMP_TO)."""
    (ptx,), (layout,) = folder.glob("*.ptx"), folder.glob("*.after_layout_inference.txt")
    return parse(ptx.read_text(errors="replace")), launch(layout.read_text())
