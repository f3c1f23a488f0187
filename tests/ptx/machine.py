"""Runs a compiled kernel's PTX on NumPy, a warp at a time, and refuses what synchronization does not allow.

For kernels of Hopper GPUs that read device memory and write other device memory, without TMA. Warps of a thread block
take turns in an order that is chosen: all of one as far as it goes, or a statement of each. A matrix product is done
when it is asked for or as late as may be. Products and sums of float32 whose rounding is not named are contracted, as
ptxas may do, or not. What is right under all of these, with `memory` looking on, needs no luck.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from tests.ptx import arithmetic, wgmma
from tests.ptx.memory import SHARED_BASE, Device, Fault, Shared
from tests.ptx.program import Instruction, Launch, Program

LANES = 32
ORDERS = ("forwards", "backwards", "in turns")
_NOTHING = {"fence.mbarrier_init.release.cluster"}


def run(
    program: Program,
    launch: Launch,
    inputs: Sequence[np.ndarray],
    results: Sequence[tuple[tuple[int, ...], np.dtype]],
    choices: "Choices",
) -> list[np.ndarray]:
    """The results of a kernel.

    Args:
      inputs: the kernel's operands; results: shapes and dtypes of what it writes.
      choices: what the hardware or its compiler may do one way or the other.

    Raises:
      Fault: what the kernel must not do, with the statement.
      NotImplementedError: a statement that is not known here.
    """
    device = Device(inputs, results)
    addresses = dict(zip(program.parameters, (device.addresses[i] for i in launch.arguments), strict=True))
    for z, y, x in itertools.product(*map(range, reversed(launch.grid))):
        _Block(program, launch, device, addresses, (x, y, z), choices).run()
    return device.results()


@dataclasses.dataclass(frozen=True)
class Choices:
    """Attributes:
    order: of warps, one of ORDERS.
    late: matrix products read their tiles when they are waited for.
    contract: a product and a sum of it are rounded once.
    """

    order: str = "backwards"
    late: bool = True
    contract: bool = False


@dataclasses.dataclass
class _Barrier:
    """Of either kind; `clocks` are those of the warps that have come in this phase, `done` those of each one before."""

    expected: int
    clocks: np.ndarray
    come: int = 0
    done: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def phase(self) -> int:
        return len(self.done)

    def arrive(self, clocks: np.ndarray, lanes: int) -> None:
        self.clocks = np.maximum(self.clocks, clocks)
        self.come += lanes
        if self.come > self.expected:
            raise Fault("more lanes come to a barrier than it waits for")
        if self.come == self.expected:
            self.done.append(self.clocks)
            self.come, self.clocks = 0, np.zeros_like(self.clocks)


class _Block:
    """A thread block."""

    def __init__(self, program: Program, launch: Launch, device: Device, addresses, index, choices: Choices):
        self.program, self.device, self.addresses, self.index, self.choices = program, device, addresses, index, choices
        count = launch.threads // LANES
        self.shared = Shared(launch.shared_bytes, count)
        self.threads = launch.threads
        self.barriers: dict[tuple[str, int], _Barrier] = {}
        self.warps = [_Warp(self, i) for i in range(count)]

    def run(self) -> None:
        order = self.choices.order
        warps = self.warps[::-1] if order == "backwards" else self.warps
        while any(not warp.done for warp in warps):
            moved = False
            for warp in warps:
                while not warp.done and warp.step():
                    moved = True
                    if order == "in turns":
                        break
            if not moved:
                raise Fault(f"all warps wait: {[str(w.instruction) for w in warps if not w.done]}")

    def barrier(self, kind: str, address: int, expected: int | None = None) -> _Barrier:
        key = kind, address
        if key not in self.barriers or (kind == "mbarrier" and expected is not None):
            if expected is None:
                raise Fault("a barrier that is not initialized")
            self.barriers[key] = _Barrier(expected, np.zeros(len(self.warps), int))
        return self.barriers[key]


class _Warp:
    def __init__(self, block: _Block, number: int):
        self.block, self.number = block, number
        self.registers: dict[str, np.ndarray] = {}
        self.at = 0
        self._waits_for: tuple[_Barrier, int] | None = None
        self._products: list[list[tuple]] = [[]]  # groups; the last one is not committed yet
        self._busy: set[str] = set()  # registers of products that are not waited for
        self._unfenced: set[str] = set()  # registers written since the last wgmma.fence
        self._factors: dict[str, list[np.ndarray]] = {}  # of what a register holds the product of

    @property
    def done(self) -> bool:
        return self.at >= len(self.block.program.instructions)

    @property
    def instruction(self) -> Instruction:
        return self.block.program.instructions[self.at]

    def step(self) -> bool:
        """Executes a statement; False if it has to wait."""
        instruction = self.instruction
        try:
            return self._execute(instruction)
        except (Fault, NotImplementedError, KeyError) as error:
            raise type(error)(f"{instruction}: {error}") from error

    def _execute(self, instruction: Instruction) -> bool:
        opcode, operands = instruction.opcode, instruction.operands
        mask = np.ones(LANES, bool)
        if instruction.guard:
            mask = self._read(instruction.guard[0], 1) != instruction.guard[1]
        if opcode.startswith("bra"):
            if mask.any() and not mask.all():
                raise NotImplementedError("lanes of a warp part")
            self.at = self.block.program.labels[operands[0]] if mask.all() else self.at + 1
            return True
        if opcode == "ret":
            if not mask.all():
                raise NotImplementedError("lanes of a warp part")
            self.at = len(self.block.program.instructions)
            return True
        if not mask.any() or opcode in _NOTHING:
            self.at += 1
            return True
        went_on = self._statement(opcode, operands, mask)
        self.at += went_on
        return went_on

    def _statement(self, opcode: str, operands: tuple[str, ...], mask: np.ndarray) -> bool:
        name = opcode.split(".")[0]
        if name in ("bar", "mbarrier", "fence", "wgmma"):
            return self._synchronize(opcode, operands, mask)
        if name in ("ld", "st"):
            self._access(opcode, operands, mask)
        elif name == "mov":
            self._move(opcode, operands, mask)
        elif name == "shfl":
            self._write(operands[0], self._shuffled(opcode, operands), 32, mask)
        elif name == "elect":
            number, is_first = operands[0].split("|")
            self._write(number, np.zeros(LANES, np.uint32), 32, mask)
            self._write(is_first, np.arange(LANES) == 0, 1, mask)
        elif name == "selp":
            width = int(opcode[-2:])
            a, b, condition = (self._read(o, w) for o, w in zip(operands[1:], (width, width, 1), strict=True))
            self._write(operands[0], np.where(condition, a, b), width, mask)
        elif name == "setp":
            self._compare(opcode, operands, mask)
        else:
            self._compute(opcode, operands, mask)
        return True

    def _compute(self, opcode: str, operands: tuple[str, ...], mask: np.ndarray) -> None:
        parts = opcode.split(".")
        if opcode in arithmetic.TABLE:
            function, widths, width = arithmetic.TABLE[opcode]
        elif parts[0] == "cvt" and len(parts) == 3 and (function := arithmetic.conversion(*parts[1:])):
            widths, width = (int(parts[2][1:]),), int(parts[1][1:])
        else:
            raise NotImplementedError("unknown here")
        values = [self._read(o, w) for o, w in zip(operands[1:], widths, strict=True)]
        if self.block.choices.contract and opcode in ("add.f32", "sub.f32"):
            function, values = self._contracted(opcode, operands[1:], values) or (function, values)
        with np.errstate(over="ignore"):
            self._write(operands[0], function(*values), width, mask)
        if opcode == "mul.f32" and mask.all():
            self._factors[operands[0]] = values

    def _contracted(self, opcode: str, names: Sequence[str], values: list[np.ndarray]):
        """(fma, its operands) for a sum or difference of which one is a product, or None."""
        sign = np.uint32(0x80000000 if opcode == "sub.f32" else 0)
        if names[0] in self._factors:
            return arithmetic.TABLE["fma.rn.f32"][0], [*self._factors[names[0]], values[1] ^ sign]
        if names[1] in self._factors:
            a, b = self._factors[names[1]]
            return arithmetic.TABLE["fma.rn.f32"][0], [a ^ sign, b, values[0]]
        return None

    def _compare(self, opcode: str, operands: tuple[str, ...], mask: np.ndarray) -> None:
        _, relation, *combined, kind = opcode.split(".")
        a, b = (self._read(o, int(kind[1:])) for o in operands[1:3])
        result = arithmetic.comparison(relation, kind)(a, b)
        if combined:
            function, _, _ = arithmetic.TABLE[f"{combined[0]}.pred"]
            result = function(result, self._read(operands[3], 1))
        self._write(operands[0], result, 1, mask)

    def _move(self, opcode: str, operands: tuple[str, ...], mask: np.ndarray) -> None:
        kind, (to, source) = opcode.split(".")[1], operands
        width = 1 if kind == "pred" else int(kind[1:])
        if source.startswith("{"):
            parts = _vector(source)
            each = width // len(parts)
            values = [self._read(part, each).astype(np.uint64) << np.uint64(i * each) for i, part in enumerate(parts)]
            self._write(to, np.bitwise_or.reduce(values), width, mask)
            return
        value = self._read(source, width)
        if not to.startswith("{"):
            self._write(to, value, width, mask)
            return
        parts = _vector(to)
        each = width // len(parts)
        for i, part in enumerate(parts):
            self._write(part, value.astype(np.uint64) >> np.uint64(i * each) & np.uint64(2**each - 1), each, mask)

    def _shuffled(self, opcode: str, operands: tuple[str, ...]) -> np.ndarray:
        value, which = self._read(operands[1], 32), self._read(operands[2], 32)
        lanes = np.arange(LANES)
        source = {"idx": which, "bfly": lanes ^ which}[opcode.split(".")[2]]
        return value[source.astype(int) & 31]

    def _access(self, opcode: str, operands: tuple[str, ...], mask: np.ndarray) -> None:
        name, *modifiers, kind = opcode.split(".")
        where, what = operands if name == "st" else operands[::-1]
        if modifiers[:1] == ["param::entry"]:
            address = self.block.addresses[where.strip("[]")]
            self._write(what, np.full(LANES, address, np.uint64), 64, mask)
            return
        parts, width = _vector(what), int(kind[1:])
        base, _, offset = where.strip("[]").partition("+")
        is_shared = "shared" in modifiers
        addresses = self._read(base, 32 if is_shared else 64).astype(np.int64)[mask] + int(offset or 0)
        size = len(parts) * width // 8
        if name == "ld":
            read = (
                self.block.shared.read(self.number, addresses, size)
                if is_shared
                else self.block.device.read(addresses, size)
            )
            values = np.zeros((LANES, size), np.uint8)
            values[mask] = read
            values = values.view(arithmetic.integer(width))
            for i, part in enumerate(parts):
                self._write(part, values[:, i], width, mask)
            return
        values = np.stack([self._read(part, width) for part in parts], axis=-1).astype(arithmetic.integer(width))
        values = np.ascontiguousarray(values).view(np.uint8).reshape(LANES, size)[mask]
        if is_shared:
            self.block.shared.write(self.number, addresses, values)
        else:
            self.block.device.write(addresses, values)

    def _synchronize(self, opcode: str, operands: tuple[str, ...], mask: np.ndarray) -> bool:
        clocks = self.block.shared.clocks
        if opcode == "fence.proxy.async.shared::cta":
            self.block.shared.fence(self.number)
        elif opcode == "bar.sync":
            return self._bar_sync(operands)
        elif opcode.startswith("mbarrier.init"):
            self.block.barrier("mbarrier", self._address(operands[0]), int(self._read(operands[1], 32)[0]))
        elif opcode.startswith("mbarrier.arrive.release.cta"):
            self.block.barrier("mbarrier", self._address(operands[1])).arrive(clocks[self.number], int(mask.sum()))
            clocks[self.number][self.number] += 1
        elif opcode.startswith("mbarrier.try_wait.parity"):
            barrier = self.block.barrier("mbarrier", self._address(operands[1]))
            passed = barrier.phase % 2 != int(self._read(operands[2], 32)[0])
            if passed:  # before the first phase is done, the one before it counts as done
                clocks[self.number] = np.maximum(clocks[self.number], barrier.done[-1] if barrier.done else 0)
                self._write(operands[0], np.ones(LANES, bool), 1, mask)
            return passed
        elif opcode.startswith("wgmma.mma_async"):
            self._product(opcode, operands)
        elif opcode == "wgmma.fence.sync.aligned":
            self._unfenced.clear()
        elif opcode == "wgmma.commit_group.sync.aligned":
            self._products.append([])
        elif opcode == "wgmma.wait_group.sync.aligned":
            self._finish(int(operands[0]))
        else:
            raise NotImplementedError("unknown here")
        return True

    def _bar_sync(self, operands: tuple[str, ...]) -> bool:
        clocks = self.block.shared.clocks
        number = int(self._read(operands[0], 32)[0])
        if self._waits_for is None:
            expected = int(self._read(operands[1], 32)[0]) if len(operands) > 1 else self.block.threads
            barrier = self.block.barrier("bar", number, expected)
            self._waits_for = barrier, barrier.phase
            barrier.arrive(clocks[self.number], LANES)
            clocks[self.number][self.number] += 1
        barrier, phase = self._waits_for
        if barrier.phase == phase:
            return False
        clocks[self.number] = np.maximum(clocks[self.number], barrier.done[phase])
        self._waits_for = None
        return True

    def _product(self, opcode: str, operands: tuple[str, ...]) -> None:
        registers, a, b, accumulate, sign_a, sign_b, *transposed = operands
        if (sign_a, sign_b) != ("1", "1") or not self._read(accumulate, 1).all():
            raise NotImplementedError("a product that is not added to what is there")
        tiles = (
            wgmma.Tile.of(int(self._read(each, 64, busy=True)[0]), flag == "1")
            for each, flag in zip((a, b), transposed, strict=True)
        )
        names = _vector(registers)
        if self._unfenced.intersection(names):
            raise Fault("accumulators are written without wgmma.fence before a product adds to them")
        product = names, *tiles, wgmma.width(opcode)
        self._busy.update(names)
        if not self.block.choices.late:
            self._multiply(product)
        self._products[-1].append(product)

    def _finish(self, pending: int) -> None:
        """All groups but the last ones are done."""
        while len(self._products) > pending + 1:
            for product in self._products.pop(0):
                if self.block.choices.late:
                    self._multiply(product)
        self._busy = {name for group in self._products for names, *_ in group for name in names}

    def _multiply(self, product: tuple) -> None:
        names, a, b, columns = product
        before = [self._read(name, 32, busy=True) for name in names]
        after = wgmma.multiply(self.block.shared, self.number, a, b, columns, before)
        for name, value in zip(names, after, strict=True):
            self.registers[name] = value

    def _address(self, operand: str) -> int:
        return int(self._read(operand.strip("[]"), 32)[0])

    def _read(self, operand: str, width: int, busy: bool = False) -> np.ndarray:
        """An entry a lane, unsigned."""
        dtype = arithmetic.integer(width)
        if operand in self._busy and not busy:
            raise Fault(f"{operand} belongs to a product that is not waited for")
        if operand in self.registers:
            return self.registers[operand].astype(dtype)
        if operand == "%tid.x":
            return (np.arange(LANES) + LANES * self.number).astype(dtype)
        if operand.startswith("%ctaid."):
            return np.full(LANES, self.block.index["xyz".index(operand[-1])], dtype)
        if operand == "__dynamic_shmem__0":
            return np.full(LANES, SHARED_BASE, dtype)
        if operand.startswith("0f"):
            return np.full(LANES, int(operand[2:], 16), dtype)
        if operand.startswith("%"):  # never written, as the unused half of a pair may be: nothing may depend on it
            return np.full(LANES, 2**width - 1, dtype)
        return np.full(LANES, int(operand.rstrip("U"), 0) % 2**width if width > 1 else int(operand), dtype)

    def _write(self, name: str, value: np.ndarray, width: int, mask: np.ndarray) -> None:
        if name == "_":
            return
        if name in self._busy:
            raise Fault(f"{name} belongs to a product that is not waited for")
        self._factors.pop(name, None)
        self._unfenced.add(name)
        value = value.astype(arithmetic.integer(width))
        old = self.registers.get(name)
        self.registers[name] = value if mask.all() or old is None else np.where(mask, value, old.astype(value.dtype))


def _vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]
