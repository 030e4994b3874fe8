"""Ahead-of-time compilation of every kernel, without a GPU: registers, spills and shared memory as a guard for CI.

`python -m pagewire_kernels.aot` prints the table, `--markdown` as kernels/resources.md has it.
"""

import sys
from typing import Any

from pagewire_kernels.aot_attention import attention_entries
from pagewire_kernels.aot_linear import linear_entries
from pagewire_kernels.aot_step import step_entries
from pagewire_kernels.compile_ahead import Entry, ResourceUsage, compile_kernel


def entries() -> list[Entry]:
    """Every kernel, for the shapes and dtypes it is launched with."""
    return attention_entries() + step_entries() + linear_entries()


def main() -> None:
    """Print the resource table of every entry on every target it can run on."""
    row: Any = _markdown_row if "--markdown" in sys.argv else _text_row
    for entry in entries():
        for sm in entry.sms:
            print(row(compile_kernel(entry, sm)), flush=True)


def _text_row(used: ResourceUsage) -> str:
    return (
        f"{used.name:44} sm_{used.sm:<4} {used.registers:4} registers {used.spill_bytes:4} B spilled "
        f"{used.shared_bytes / 1024:7.1f} KiB shared {used.num_warps:3} warps"
    )


def _markdown_row(used: ResourceUsage) -> str:
    return (
        f"| {used.name} | {used.sm} | {used.registers} | {used.spill_bytes} | {used.shared_bytes / 1024:.1f} | "
        f"{used.num_warps} |"
    )


if __name__ == "__main__":
    main()
