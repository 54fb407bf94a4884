"""The section `training`."""

from typing import Literal

from pydantic import Field

from pipeline.sections.section import Section


class Training(Section):
    """Length, batch, precision, seed and execution of a training."""

    epochs: int = Field(ge=1, le=10_000)
    batch_size: int = Field(128, ge=2, le=65_536)
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 where the hardware has it")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of the gradient of all weights; 0: not clipped")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="exponential moving average of the weights; 0: none")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="initial weights, data order, augmentation, dropout")
    deterministic: bool = Field(False, description="on a GPU: bit for bit the same run again, slower; a CPU always is")
    execution: Literal["eager", "compiled", "graphed", "compiled_graphed"] = Field(
        "eager", description="of a step: kernel by kernel, by compiled code, as a replayed CUDA graph, as both"
    )
