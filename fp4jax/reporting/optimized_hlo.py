"""Reads optimized HLO, to see whether the operands of its matrix products still come from codes of few bits.

The question is asked of the data flow: every path from an operand back to floating-point numbers that the program was
given, or to another product, must pass through few bits or through a reduction of many elements (a scale, a mean; few
are what a product split along its contraction is summed from). A format round trip that the compiler folds away opens a
path without either. Counting or comparing instructions would not show it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from fp4jax import scopes

_FEW_BITS = re.compile(r"(pred|[su][248]|f8\w+|f4\w+)\[")
_FLOATS = re.compile(r"\(?(f64|f32|f16|bf16)\[")
_REDUCTIONS = {"reduce", "reduce-window"}
_MANY = 16
_GIVEN = {"constant", "iota", "rng", "partition-id", "replica-id", "after-all"}
_FIRST_OPERANDS = {"dynamic-slice": 1, "gather": 1, "dynamic-update-slice": 2}  # those behind are positions
_PRODUCTS = {"dot", "convolution", "ragged-dot", "scaled-dot"}
_KERNEL_CALL = 'custom_call_target="mosaic_gpu'
_PRODUCT_CALLS = re.compile(r'custom_call_target="(__cublas\$\w+(\$\w+)*|__cudnn\$\w+|__onednn\$matmul)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `type` as printed, `operands` by name (for a constant its text), `rest` the attributes."""

    name: str
    computation: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    rest: str

    @property
    def scope(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    @property
    def size(self) -> int:
        """Elements, of the first array of a tuple."""
        return math.prod(map(int, filter(None, re.search(r"\[([\d,]*)\]", self.type)[1].split(","))))

    @property
    def is_product(self) -> bool:
        is_call = self.opcode == "custom-call" and bool(_PRODUCT_CALLS.search(self.rest))
        return self.opcode in _PRODUCTS or is_call or self.is_fused

    @property
    def is_fused(self) -> bool:
        """Whether it is a kernel that multiplies: of ours, one where a product is asked for."""
        return self.opcode == "custom-call" and _KERNEL_CALL in self.rest and bool(scopes.read(self.scope).quantized)

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional, in the order of the operands behind the first."""
        listed = re.search(r"\bbranch_computations=\{([^}]*)\}", self.rest)
        if listed:
            return re.findall(r"[\w.-]+", listed[1])
        return [name for name in map(self.called, ("true_computation", "false_computation")) if name]

    def called(self, attribute: str) -> str | None:
        match = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        return match[1] if match else None


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced brackets: {text[start : start + 80]}")


_LINE = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$|^(ENTRY )?%?([\w.-]+) \{\s*$")


class Program:
    """A compiled module's computations."""

    def __init__(self, text: str):
        self.instructions: dict[tuple[str, str], Instruction] = {}
        self.parameters: dict[tuple[str, int], Instruction] = {}
        self.roots: dict[str, Instruction] = {}
        self.callers: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._parse(text)
        for instruction in self.instructions.values():
            called = re.findall(r"\b(?:calls|to_apply|body|condition)=%?([\w.-]+)", instruction.rest)
            for computation in called + instruction.branches:
                self.callers.setdefault(computation, []).append(instruction)

    def _parse(self, text: str) -> None:
        computation = ""
        for line in text.splitlines():
            head = _HEAD.match(line)
            if head:
                computation = head[2] or head[4]
                if head[1] or head[3]:
                    self.entry = computation
                continue
            match = _LINE.match(line)
            if match:
                instruction = _instruction(computation, match[2], re.sub(r"/\*.*?\*/", "", line[match.end() :]))
                self.instructions[computation, instruction.name] = instruction
                if match[1]:
                    self.roots[computation] = instruction
                if instruction.opcode == "parameter":
                    self.parameters[computation, int(instruction.argument)] = instruction
        if not self.entry or not self.roots:
            raise ValueError("no HLO module with an entry computation")

    def products(self) -> Iterator[Instruction]:
        return (instruction for instruction in self.instructions.values() if instruction.is_product)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[instruction.computation, name] for name in instruction.operands]

    def multiplied(self, product: Instruction) -> list[Instruction]:
        """Both operands of a product; of a kernel their codes, which scales stand beside."""
        return self.operands(product)[1:4:2] if product.is_fused else self.operands(product)[:2]

    def precise_source(self, value: Instruction) -> Instruction | None:
        """A floating-point input or a product that reaches `value` in full precision, or None."""
        todo, seen = [(value, None)], set()
        while todo:
            at = todo.pop()
            if at in seen:
                continue
            seen.add(at)
            instruction, index = at
            if instruction.opcode == "parameter" and instruction.computation == self.entry:
                if _FLOATS.match(instruction.type):
                    return instruction
            elif instruction.is_product:
                return instruction
            elif not self._loses_information(instruction):
                todo += self._sources(instruction, index)
        return None

    def _loses_information(self, instruction: Instruction) -> bool:
        if instruction.opcode in _GIVEN or _FEW_BITS.match(instruction.type):
            return True
        if instruction.opcode in _REDUCTIONS:
            return self.operands(instruction)[0].size >= _MANY * instruction.size
        if instruction.opcode == "and":
            return any(0 <= constant < 256 for constant in self._constants(instruction.operands, instruction))
        if instruction.opcode == "shift-right-logical":
            return any(16 <= constant < 32 for constant in self._constants(instruction.operands[1:], instruction))
        return False

    def _constants(self, names, instruction: Instruction) -> Iterator[int]:
        """The values of operands that are integer constants, broadcast or converted or not."""
        for name in names:
            operand = self.instructions[instruction.computation, name]
            while operand.opcode in ("broadcast", "convert", "bitcast", "reshape", "copy", "parameter"):
                if operand.opcode == "parameter":
                    callers = self.callers.get(operand.computation, ())
                    if len(callers) != 1 or callers[0].opcode not in ("fusion", "call"):
                        break
                    name, computation = callers[0].operands[int(operand.argument)], callers[0].computation
                else:
                    name, computation = operand.operands[0], operand.computation
                operand = self.instructions[computation, name]
            if operand.opcode == "constant" and re.fullmatch(r"\d+", operand.argument):
                yield int(operand.argument)

    def _sources(self, instruction: Instruction, index: int | None) -> list[tuple[Instruction, int | None]]:
        operands = self.operands(instruction) if instruction.opcode not in ("parameter", "constant") else []
        match instruction.opcode:
            case "parameter":
                return self._arguments(instruction, index)
            case "get-tuple-element":
                return [(operands[0], int(re.search(r"\bindex=(\d+)", instruction.rest)[1]))]
            case "tuple":
                return [(operands[index], None)] if index is not None else [(o, None) for o in operands]
            case "while":
                return [(operands[0], index), (self.roots[instruction.called("body")], index)]
            case "fusion" | "fusion-start":
                return [(self.roots[instruction.called("calls")], index)]
            case "call":
                return [(self.roots[instruction.called("to_apply")], index)]
            case "conditional":
                return [(self.roots[branch], index) for branch in instruction.branches]
            case "optimization-barrier":
                return [(operands[0], index)]
            case opcode:
                return [(operand, None) for operand in operands[: _FIRST_OPERANDS.get(opcode)]]

    def _arguments(self, parameter: Instruction, index: int | None):
        """What the callers of a computation pass for one of its parameters."""
        found = []
        for caller in self.callers[parameter.computation]:
            if caller.opcode == "conditional":
                taken = [i for i, branch in enumerate(caller.branches) if branch == parameter.computation]
                found += [(self.operands(caller)[1 + branch], index) for branch in taken]
                continue
            operand = self.instructions[caller.computation, caller.operands[int(parameter.argument)]]
            found.append((operand, index))
            if caller.opcode == "while":
                found.append((self.roots[caller.called("body")], index))
        return found


def _instruction(computation: str, name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text[0] == "(" else re.match(r"\w+\[[^\]]*\]", text).end()
    if text[end : end + 1] == "{":
        end = _closing(text, end) + 1
    opcode = re.match(r" ([\w-]+)\(", text[end:])
    start = end + opcode.end() - 1
    stop = _closing(text, start)
    argument = text[start + 1 : stop]
    operands = () if opcode[1] in ("parameter", "constant") else tuple(re.findall(r"%([\w.-]+)", argument))
    return Instruction(name, computation, text[:end], opcode[1], operands, argument, text[stop + 1 :])
