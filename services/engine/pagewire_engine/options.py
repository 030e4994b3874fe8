"""The engine's flags, as given."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """Nothing is resolved yet; see the flags of the same names in pagewire_core.flags."""

    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    quantization: str | None = None
    max_model_len: int | None = None
    block_size: int = 16
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    enforce_eager: bool = False
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_prefill_delay_ms: float = 50.0
    enable_prefix_caching: bool = True
    threads: int | None = None
    cpus: tuple[int, ...] = ()  # that the threads divide among them; empty: all that there are
    cpu_lending: str | None = None
    poison_free_blocks: bool = False  # tests: a free block holds NaN, so that any stale read shows

    @property
    def num_ranks(self) -> int:
        """Processes that compute a step together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size
