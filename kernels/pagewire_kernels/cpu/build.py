"""Compiles the CPU step for the machine at hand, once, and keeps the result.

One source, one library per variant: the instruction sets that the compiler may use. The library is kept under a name
that a change of source, flags or compiler changes, so a second start compiles nothing. An image has all variants of
its architecture in `built/`, and no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger("pagewire.kernels")

SOURCE = Path(__file__).parent / "step.cpp"
_BUILT = SOURCE.parent / "built"
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
    "-pthread",
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
_BF16_VNNI = (
    (*_AVX512, "-mavx512bf16", "-mavx512vnni"),
    frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni", "fma"}),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")

# Best first: compiler flags, and what /proc/cpuinfo must list for the code to run.
VARIANTS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "amx": (
        (*_BF16_VNNI[0], "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        _BF16_VNNI[1] | {"amx_tile", "amx_bf16", "amx_int8"},
    ),
    "avx512-bf16-vnni": _BF16_VNNI,
    "avx512-vnni": (
        (*_AVX512, "-mavx512vnni"),
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"}),
    ),
    "avx512": (_AVX512, frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"})),
    "avx2-vnni": ((*_AVX2, "-mavxvnni"), frozenset({"avx2", "fma", "f16c", "avx_vnni"})),
    "avx2": (_AVX2, frozenset({"avx2", "fma", "f16c"})),
    "neon-bf16": (("-march=armv8.2-a+dotprod+bf16",), frozenset({"asimd", "asimddp", "bf16"})),
    "neon": (("-march=armv8.2-a+dotprod",), frozenset({"asimd", "asimddp"})),
    "portable": ((), frozenset()),
}


# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) on x86-64.
_SYS_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA = 158, 0x1023, 18


class BuildError(Exception):
    """The CPU step cannot be compiled or run here; the message says why."""


class CompileError(BuildError):
    """The compiler here cannot make a variant; perhaps it is older than the instructions."""


def runnable() -> list[str]:
    """Variants that this CPU can run, best first."""
    features = _cpu_features()
    if "amx_tile" in features and not _matrix_unit_is_granted():
        logger.info("the kernel refuses this process the CPU's matrix unit (AMX): prompts take several times as long")
        features -= {"amx_tile"}
    return [name for name, (_, needed) in VARIANTS.items() if needed <= features]


def best_variant() -> str:
    """The best variant that this CPU can run and the compiler here can make, which is built then.

    PAGEWIRE_CPU_VARIANT forces one. Raises BuildError.
    """
    variants = runnable()
    if forced := os.environ.get("PAGEWIRE_CPU_VARIANT"):
        if forced not in variants:
            raise BuildError(f"PAGEWIRE_CPU_VARIANT={forced!r} cannot run here; this CPU runs {', '.join(variants)}")
        variants = [forced]
    refusal: CompileError | None = None  # of the best
    for variant in variants:
        try:
            library_path(variant)
        except CompileError as error:
            refusal = refusal or error
            continue
        if refusal:
            logger.warning("the CPU step is slower than it could be: there is none for %s, as %s", variants[0], refusal)
        return variant
    assert refusal, "every CPU runs the portable variant"
    raise refusal


def library_path(variant: str) -> Path:
    """The compiled library of `variant`, built first if it is not there. Raises BuildError."""
    if (built := _BUILT / f"{variant}.so").exists():
        return built
    path = _cache_dir() / f"cpu-step-{variant}-{_digest(variant)}.so"
    if not path.exists():
        logger.info("compiling the CPU step for %s, once", variant)
        _compile(variant, path)
    return path


def _matrix_unit_is_granted() -> bool:
    """Whether the kernel lets this process use AMX; Linux has it ask first, and a sandbox may refuse."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0)


def _cpu_features() -> frozenset[str]:
    if platform.machine() in ("arm64",):  # macOS names no flags; every such machine has both
        return frozenset({"asimd", "asimddp"})
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pagewire"


@functools.cache
def _compiler() -> tuple[str, str]:
    """The C++ compiler and what it says of itself. Raises BuildError."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        path = shutil.which(name)
        if path:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
            return path, said.stdout
    raise BuildError("there is no C++ compiler (install g++, or set CXX)")


def _digest(variant: str) -> str:
    """Names what the library is made of."""
    digest = hashlib.sha256(_compiler()[1].encode())
    for part in (*_FLAGS, *VARIANTS[variant][0]):
        digest.update(part.encode())
    for file in [*sorted(SOURCE.parent.glob("*.h")), SOURCE]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(variant: str, path: Path) -> None:
    """Compiles beside the final place and renames: two processes may do so at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written: {error.strerror}") from None
    try:
        command = [_compiler()[0], *_FLAGS, *VARIANTS[variant][0], str(SOURCE), "-o", part]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise CompileError(f"the compiler failed: {reason.strip()}")
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def compile_all() -> None:
    """Every variant of this architecture, into the package itself: `python -m pagewire_kernels.cpu.build --all`."""
    is_arm = platform.machine() in ("aarch64", "arm64")
    for variant in VARIANTS:
        if variant == "portable" or variant.startswith("neon") == is_arm:
            _compile(variant, _BUILT / f"{variant}.so")


def main() -> None:
    """Builds the variant that this machine will use: `python -m pagewire_kernels.cpu.build`."""
    if sys.argv[1:] == ["--all"]:
        return compile_all()
    try:
        print(f"CPU step, {(variant := best_variant())}: {library_path(variant)}")
    except BuildError as error:
        print(f"No compiled CPU step: {error}. Models will run on plain torch, several times slower.")


if __name__ == "__main__":
    main()
