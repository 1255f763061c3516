"""Number format, memory layout and compilation of training."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """`autocast` is a torch dtype's name, or "" for plain float32."""

    autocast: str = ""
    channels_last: bool = True
    compiled: bool = False
    """What --compile auto chose."""
    tf32: bool = False
    """Products of float32 numbers are TF32, also those that are left with autocast."""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.autocast) if self.autocast else torch.float32

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def name(self) -> str:
        """Value of --precision that names it."""
        return {"": "tf32" if self.tf32 else "fp32", "bfloat16": "bf16", "float16": "fp16"}[self.autocast]

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.name}, {layout}{', compiled' if self.compiled else ''}"
