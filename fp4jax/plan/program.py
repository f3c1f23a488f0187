"""What an optimized program does when it runs, loops multiplied: its collectives and the memory it reads and writes."""

import collections
import math
import re
from collections.abc import Iterator

from fp4jax.plan.groups import leave_machines
from fp4jax.reporting.optimized_hlo import Instruction, Program

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all",
    "collective-broadcast",
)  # fmt: skip
# They move nothing: names for what is there, or brackets around what is counted inside.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "optimization-barrier", "partition-id", "replica-id", "async-start", "async-update", "async-done",
}  # fmt: skip
_COPIES = {"copy", "copy-start", "copy-done", "bitcast"}
_FUSIONS = {"fusion", "fusion-start"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":"(\d+)"')


def size_in_bytes(type: str) -> int:
    """Of a type as HLO prints it, a tuple's arrays added up; two elements of 4 bits a byte."""
    total = 0
    for dtype, shape in _ARRAY.findall(type):
        bits = int(re.search(r"\d+", dtype)[0]) if dtype != "pred" else 8
        total += math.ceil(math.prod(map(int, filter(None, shape.split(",")))) * bits / 8)
    return total


class Executions:
    """The instructions that one call of a program executes.

    Attributes:
      times: executions of every computation that is not part of a fusion; both branches of a conditional count.
      unknown_loops: `while` loops whose length is not known; they count once.
    """

    def __init__(self, program: Program):
        self._program = program
        self._of_computation: dict[str, list[Instruction]] = collections.defaultdict(list)
        for instruction in program.instructions.values():
            self._of_computation[instruction.computation].append(instruction)
        self.times: collections.Counter[str] = collections.Counter()
        self.unknown_loops = 0
        self._run(program.entry, 1)

    def _run(self, computation: str, times: int) -> None:
        self.times[computation] += times
        for instruction in self._of_computation[computation]:
            match instruction.opcode:
                case "while":
                    trips = self._trips(instruction)
                    self.unknown_loops += trips is None
                    self._run(instruction.called("body"), times * (1 if trips is None else trips))
                case "call":
                    self._run(instruction.called("to_apply"), times)
                case "async-start":
                    self._run(instruction.called("calls"), times)
                case "conditional":
                    for branch in instruction.branches:
                        self._run(branch, times)

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: as XLA noted or, where it notes nothing (TPU), if it counts from 0 to a constant."""
        if noted := _TRIPS.search(loop.rest):
            return int(noted[1])
        test = self._program.roots[loop.called("condition")]
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        counter, bound = map(self._plain, self._program.operands(test))
        initial, after = self._plain(self._program.operands(loop)[0]), self._program.roots[loop.called("body")]
        if (initial.opcode, after.opcode) != ("tuple", "tuple"):
            return None
        if (counter.opcode, bound.opcode) != ("get-tuple-element", "constant"):
            return None
        index = int(re.search(r"\bindex=(\d+)", counter.rest)[1])
        first, following = (self._plain(self._program.operands(values)[index]) for values in (initial, after))
        steps = [operand.argument for operand in self._program.operands(following)] if following.opcode == "add" else []
        return int(bound.argument) if (first.opcode, first.argument) == ("constant", "0") and "1" in steps else None

    def _plain(self, value: Instruction) -> Instruction:
        """What a value is a copy of."""
        while value.opcode in _COPIES:
            value = self._program.operands(value)[0]
        return value

    def __iter__(self) -> Iterator[tuple[Instruction, int]]:
        for computation, times in self.times.items():
            for instruction in self._of_computation[computation]:
                yield instruction, times

    def collectives(self) -> dict[str, dict[str, int]]:
        """{"all-gather": {"count": executions, "bytes": of one device's}}.

        Bytes are the larger of what goes in and what comes out, added up over the executions: the gathered array, the
        array before it is scattered.
        """
        found: dict[str, collections.Counter] = {}
        for instruction, times in self:
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found.setdefault(kind, collections.Counter()).update(
                    count=times, bytes=times * self._moved(instruction)
                )
        return {kind: dict(found[kind]) for kind in COLLECTIVES if kind in found}

    def between_machines(self, devices: int, on_a_machine: int) -> dict[str, int]:
        """Bytes, as in `collectives`, of those whose groups are not each on one machine of so many devices."""
        found: collections.Counter[str] = collections.Counter()
        for instruction, times in self:
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and leave_machines(instruction.rest, devices, on_a_machine):
                found[kind] += times * self._moved(instruction)
        return dict(found)

    def _moved(self, collective: Instruction) -> int:
        given = sum(size_in_bytes(operand.type) for operand in self._program.operands(collective))
        size = size_in_bytes(collective.type)
        if collective.opcode.endswith("-start") and size > given:  # a tuple of what goes in and what comes out
            size -= given
        return max(given, size)

    def gathers(self) -> dict[str, dict[str, int]]:
        """{"u8[512,3072]": {"count": executions, "bytes": of all of them}}: every kind of array that all-gathers make.

        The share of the all-gathers in `collectives`, an array at a time where several travel in one.
        """
        found: dict[str, collections.Counter] = {}
        for instruction, times in self:
            if instruction.opcode.removesuffix("-start") != "all-gather":
                continue
            arrays = [f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(instruction.type)]
            given = len(instruction.operands)
            if len(arrays) == 2 * given:  # what goes in, then what comes out
                arrays = arrays[given:]
            for array in arrays:
                found.setdefault(array, collections.Counter()).update(count=times, bytes=times * size_in_bytes(array))
        return {array: dict(found[array]) for array in sorted(found)}

    def bytes_accessed(self) -> int:
        """What all instructions together read and write in memory; a fusion reads its operands and writes its result.

        Of an array that is only sliced, or updated in place, the slice counts.
        """
        return sum(times * self._traffic(instruction) for instruction, times in self)

    def custom_calls(self) -> collections.Counter[str]:
        """Executions of every target, those inside fusions too.

        XLA puts a kernel that reads or writes a slice of a stacked array into a fusion with the slicing.
        """
        found: collections.Counter[str] = collections.Counter()
        for instruction, times in self._with_fused():
            if instruction.opcode.removesuffix("-start") == "custom-call":
                found[re.search(r'custom_call_target="([^"]*)"', instruction.rest)[1]] += times
        return found

    def _with_fused(self) -> Iterator[tuple[Instruction, int]]:
        """All instructions, those of fusions too; a fusion's memory traffic is its own, not that of what is in it."""
        todo = list(self.times.items())
        while todo:
            computation, times = todo.pop()
            for instruction in self._of_computation[computation]:
                yield instruction, times
                if instruction.opcode in _FUSIONS:
                    todo.append((instruction.called("calls"), times))

    def _traffic(self, instruction: Instruction) -> int:
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0
        operands = self._program.operands(instruction)
        if instruction.opcode in _SLICES:
            return 2 * size_in_bytes(instruction.type)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * size_in_bytes(operands[1].type)
        if instruction.opcode in _FUSIONS:
            return self._traffic_of_fusion(instruction, operands)
        return size_in_bytes(instruction.type) + sum(size_in_bytes(operand.type) for operand in operands)

    def _traffic_of_fusion(self, fusion: Instruction, operands: list[Instruction]) -> int:
        computation = fusion.called("calls")
        inside = self._of_computation[computation]
        total = 0
        for number, operand in enumerate(operands):
            name = self._program.parameters[computation, number].name
            users = [user for user in inside if name in user.operands]
            if users and all(user.opcode in _SLICES and user.operands[0] == name for user in users):
                total += sum(size_in_bytes(user.type) for user in users)
            elif not (users and all(_is_updated_in_place(user, name) for user in users)):
                total += size_in_bytes(operand.type)
        return total + self._written(self._program.roots[computation])

    def _written(self, root: Instruction) -> int:
        operands = self._program.operands(root) if root.opcode != "parameter" else []
        match root.opcode:
            case "tuple":
                return sum(map(self._written, operands))
            case "bitcast":
                return self._written(operands[0])
            case "dynamic-update-slice":
                return size_in_bytes(operands[1].type)
            case _:
                return size_in_bytes(root.type)


def _is_updated_in_place(user: Instruction, name: str) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name and name not in user.operands[1:]
