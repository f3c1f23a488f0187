"""Memory of the emulated GPU, which refuses what the hardware would do silently or not at all."""

from collections.abc import Sequence

import numpy as np

SHARED_BASE = 1024
"""Where dynamic shared memory begins: aligned as swizzled tiles need it."""

_ALIGNMENT = 256
_NEVER = np.iinfo(np.int64).max
_FIRST = 1 << 33  # of device memory: an address that no 32-bit register holds


class Fault(Exception):
    """What a GPU would not do, or must not be asked to."""


class Device:
    """Device memory: arrays with nothing around them.

    Reads are of inputs, writes of results; of one byte all writes are the same.
    """

    def __init__(self, inputs: Sequence[np.ndarray], results: Sequence[tuple[tuple[int, ...], np.dtype]]):
        sizes = [array.nbytes for array in inputs] + [_size(*each) for each in results]
        begins = np.cumsum([_ALIGNMENT] + [-(-size // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT for size in sizes])
        self.addresses = [_FIRST + int(begin) for begin in begins[:-1]]
        self._bytes = np.zeros(int(begins[-1]), np.uint8)
        self._readable = np.zeros(self._bytes.size, bool)
        self._writable, self._written = self._readable.copy(), self._readable.copy()
        self._results = list(results)
        for address, array in zip(self.addresses, inputs, strict=False):
            here = slice(address - _FIRST, address - _FIRST + array.nbytes)
            self._bytes[here] = np.frombuffer(array.tobytes(), np.uint8)
            self._readable[here] = True
        self._firsts = [address - _FIRST for address in self.addresses[len(inputs) :]]
        for first, each in zip(self._firsts, results, strict=True):
            self._writable[first : first + _size(*each)] = True

    def read(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """[lanes, size] bytes."""
        at = _places(addresses, size, _FIRST, self._bytes.size)
        if not self._readable[at].all():
            raise Fault(f"reads what no input holds, at {hex(int(addresses.min()))}")
        return self._bytes[at]

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: [lanes, size] bytes."""
        at = _places(addresses, values.shape[1], _FIRST, self._bytes.size)
        if not self._writable[at].all():
            raise Fault(f"writes outside of the results, at {hex(int(addresses.min()))}")
        before = self._written[at]
        if (self._bytes[at][before] != values[before]).any():
            raise Fault("writes a byte of a result twice, and not the same")
        self._bytes[at], self._written[at] = values, True
        if (self._bytes[at] != values).any():
            raise Fault("lanes write a byte of a result at once, and not the same")

    def results(self) -> list[np.ndarray]:
        """The results, every byte of which must have been written."""
        found = []
        for first, (shape, dtype) in zip(self._firsts, self._results, strict=True):
            here = slice(first, first + _size(shape, dtype))
            if not self._written[here].all():
                raise Fault(f"leaves {np.sum(~self._written[here])} bytes of a result {shape} unwritten")
            found.append(self._bytes[here].view(dtype).reshape(shape))
        return found


class Shared:
    """Shared memory of a thread block, and who has touched it when.

    Clocks are vectors: `clocks[a][b]` is how far warp a knows what warp b has done, by barriers. What a warp reads must
    have been written before a barrier that lies between, and what it writes must have been read before one.
    """

    def __init__(self, size: int, warps: int):
        self._bytes = np.zeros(size, np.uint8)
        self._writer, self._written = np.full(size, -1), np.zeros(size, int)
        self._read = np.zeros((warps, size), int)
        self._fenced = np.full(size, _NEVER)  # the clock of the writer at its fence behind the write
        self.clocks = np.eye(warps, dtype=int)

    def read(self, warp: int, addresses: np.ndarray, size: int, asynchronously: bool = False) -> np.ndarray:
        """[lanes, size] bytes; asynchronously: by a matrix product, which sees what a fence has let through."""
        at = _places(addresses, size, SHARED_BASE, self._bytes.size)
        writers = self._writer[at]
        if (writers < 0).any():
            raise Fault("reads shared memory that nobody has written")
        if (self._written[at] > self.clocks[warp][writers])[writers != warp].any():
            raise Fault(f"warp {warp} reads shared memory without a barrier behind its writer")
        known = self.clocks[warp][writers]
        if asynchronously and (self._fenced[at] > known).any():
            raise Fault("a product reads shared memory without fence.proxy.async behind its writer")
        self._read[warp][at] = self.clocks[warp][warp]
        return self._bytes[at]

    def write(self, warp: int, addresses: np.ndarray, values: np.ndarray) -> None:
        """values: [lanes, size] bytes."""
        at = _places(addresses, values.shape[1], SHARED_BASE, self._bytes.size)
        if np.unique(at).size < at.size:
            raise Fault("lanes write a byte of shared memory at once")
        writers, others = self._writer[at], np.arange(len(self.clocks)) != warp
        late = (self._written[at] > self.clocks[warp][writers]) & (writers >= 0) & (writers != warp)
        if late.any() or (self._read[others][:, at] > self.clocks[warp][others][:, None, None]).any():
            raise Fault(f"warp {warp} overwrites shared memory that others are not known to be done with")
        self._bytes[at], self._writer[at], self._fenced[at] = values, warp, _NEVER
        self._written[at] = self.clocks[warp][warp]

    def fence(self, warp: int) -> None:
        """What the warp has written is there for matrix products too."""
        self._fenced[(self._writer == warp) & (self._fenced == _NEVER)] = self.clocks[warp][warp]


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize


def _places(addresses: np.ndarray, size: int, first: int, end: int) -> np.ndarray:
    """[lanes, size]: the place of every byte of an access."""
    at = addresses.astype(np.int64) - first
    if (at % size).any():
        raise Fault(f"an access of {size} bytes is not aligned")
    if (at < 0).any() or (at + size > end).any():
        raise Fault("an access outside of memory")
    return at[:, None] + np.arange(size)
