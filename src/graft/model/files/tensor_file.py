"""A safetensors file written tensor by tensor, and compared with what it was written from.

The safetensors package writes a file from tensors that are all there at once. Here only names, formats and shapes must
be known beforehand, so the tensors may come one by one from other devices or processes; and each write is an ordinary
one, whose error says what is wrong with the disk. Format: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

FORMATS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PIECE = 2**22
"""Bytes that are read back at a time."""


class Spec(NamedTuple):
    """A tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def in_file_order(specs: Iterable[Spec]) -> list[Spec]:
    """The order in which tensors stand in a file: widest formats first, so that each begins at a multiple of its own
    width, which readers that map the file rely on."""
    return sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))


def write_tensors(path: Path, specs: Sequence[Spec], tensors: Iterable[Tensor]) -> None:
    """Write a file from tensors that come in the order of `specs`, which must be that of `in_file_order`.

    Raises:
        OSError: the disk is full or broken.
        ValueError: a tensor is not as its spec says, or tensors are missing.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": FORMATS[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, start + spec.nbytes],
        }  # fmt: skip
        start += spec.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for spec, tensor in zip(specs, tensors, strict=True):
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                raise ValueError(f"{spec.name}: {tensor.dtype} {list(tensor.shape)} instead of {spec}")
            file.write(_bytes_of(tensor.detach().cpu()).numpy().data)


def write_mapping(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are all there; they may share memory with one another."""
    specs = in_file_order(Spec(name, value.dtype, tuple(value.shape)) for name, value in tensors.items())
    write_tensors(path, specs, (tensors[spec.name] for spec in specs))


def find_difference(paths: Iterable[Path], expected: Mapping[str, Tensor]) -> str | None:
    """What is not in the files, or otherwise than in memory, in words; None where every bit is there and no more.

    The numbers are read piece by piece: the pages of a mapped file would count as the process's memory, and a
    checkpoint is written when the run has least of it to spare.
    """
    missing = dict.fromkeys(expected)
    for path in paths:
        with safe_open(path, "pt") as opened, path.open("rb") as file:
            begin = int.from_bytes(file.read(8), "little")
            places = json.loads(file.read(begin))
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                if name not in expected:
                    return f"{path.name} holds {name}, which nothing was to be saved as"
                missing.pop(name, None)
                live, saved = expected[name].detach(), places[name]
                dtype = next((kind for kind, code in FORMATS.items() if code == saved["dtype"]), saved["dtype"])
                if saved["shape"] != list(live.shape) or dtype != live.dtype:
                    return (
                        f"{name} is {saved['shape']} {dtype} in {path.name}, {list(live.shape)} {live.dtype} in memory"
                    )
                file.seek(8 + begin + saved["data_offsets"][0])
                if not _reads_as(file, live):
                    return f"{name} has other numbers in {path.name} than in memory"
    if missing:
        return f"{len(missing)} of {len(expected)} tensors are missing, for example {next(iter(missing))}"
    return None


def _reads_as(file: BinaryIO, tensor: Tensor) -> bool:
    """Whether the file goes on with the tensor's bytes."""
    live = _bytes_of(tensor.cpu())
    buffer = bytearray(min(PIECE, len(live)))
    for start in range(0, len(live), PIECE):
        wanted = live[start : start + PIECE]
        piece = memoryview(buffer)[: len(wanted)]
        if file.readinto(piece) != len(wanted) or not torch.equal(torch.frombuffer(piece, dtype=torch.uint8), wanted):  # type: ignore[attr-defined]
            return False
    return True


def _bytes_of(tensor: Tensor) -> Tensor:
    """[bytes] of a CPU tensor in C order; a view where it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
