"""Layers onto a GPU beside the computation: two pinned buffers and a stream of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BUFFER_BYTES = 64 << 20


class Uploader:
    """Copies modules to a device while another stream computes there; on the CPU does nothing.

    A copy from ordinary memory holds the driver up and cannot run beside kernels. Here the bytes go
    through two pinned buffers in turn: one is filled by the processor while the other is sent.

    Use from one thread, other than the one that computes. ``take_over`` is for that other one.

    Args:
        device: where to.
        buffer_bytes: of each pinned buffer.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device = device
        self._bytes = buffer_bytes
        self._buffers: list[Tensor] = []
        self._sent: list[torch.cuda.Event] = []
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(self, module: nn.Module) -> nn.Module:
        """The module with its parameters and buffers on the device, complete on return."""
        if self._stream is None:
            return module.to(self._device)
        if not self._buffers:
            self._buffers = [
                torch.empty(self._bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
            self._sent = [torch.cuda.Event() for _ in range(2)]
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            module._apply(self._copy)
        self._stream.synchronize()
        return module

    def take_over(self, module: nn.Module) -> None:
        """Tell the allocator that the current stream uses the module's memory from now on."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.record_stream(current)

    def _copy(self, source: Tensor) -> Tensor:
        if source.is_cuda:
            return source.to(self._device)
        target = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        if not source.numel():
            return target
        to = target.view(-1).view(torch.uint8)
        given = source.contiguous().view(-1).view(torch.uint8)
        for begin in range(0, given.numel(), self._bytes):
            piece = given[begin : begin + self._bytes]
            buffer = self._buffers[self._turn][: piece.numel()]
            self._sent[self._turn].synchronize()
            buffer.copy_(piece)
            to[begin : begin + piece.numel()].copy_(buffer, non_blocking=True)
            self._sent[self._turn].record(self._stream)
            self._turn ^= 1
        return target
