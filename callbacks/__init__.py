"""Lightning callbacks of the method (imported as ``advdmd_lightning.callbacks``)."""

from advdmd_lightning.callbacks.generator_ema import GeneratorEMA
from advdmd_lightning.callbacks.grpo_warmup import GRPOWarmup
from advdmd_lightning.callbacks.sample_logger import SampleLogger
from advdmd_lightning.callbacks.save_on_signal import SaveOnSignal

__all__ = ["GRPOWarmup", "GeneratorEMA", "SampleLogger", "SaveOnSignal"]
