"""What the emulator implements and no form covers, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import combinations

from sm12x.emulator import families, registry
from sm12x.emulator.numerics import arith, convert, matrix, mma
from sm12x.emulator.numerics.unsupported import Unsupported

from . import tables
from .tables import conversion

_ORDER = "orders memory or threads and computes nothing: tests of SIMT and asynchrony, whole kernels"
_COPIES = "asynchronous copies and tensor maps: compared with the GPU by the tests of whole kernels"
_CONTROL = "controls the execution of a kernel and computes nothing"
_NO_SATURATION = "saturation to a type that holds every value of the source: no such form in ptxas"
_CLUSTER_LAUNCH = "SM 10.0 and later; CUTLASS's dense kernels use it"
_HINT = "a hint to caches, without a result"

# handler in the emulator's registry -> why no form covers it
HANDLERS = {
    **dict.fromkeys(("bar", "bar.cta", "barrier", "barrier.cta", "fence", "membar"), _ORDER),
    **dict.fromkeys(("barrier.cluster.arrive", "barrier.cluster.wait"), _ORDER),
    "barrier.warp.sync": "another name of bar.warp.sync, which nvcc does not write and ptxas does not take",
    **dict.fromkeys(
        (
            f"mbarrier.{name}"
            for name in ("arrive", "arrive_drop", "complete_tx", "expect_tx", "init", "inval")
        ),
        _COPIES,
    ),
    **dict.fromkeys((f"mbarrier.{name}" for name in ("pending_count", "test_wait", "try_wait")), _COPIES),
    **dict.fromkeys(
        (f"cp.async.{name}" for name in ("ca", "cg", "commit_group", "wait_all", "wait_group")), _COPIES
    ),
    **dict.fromkeys(
        ("cp.async.mbarrier.arrive", "cp.reduce.async.bulk", "cp.reduce.async.bulk.tensor"), _COPIES
    ),
    **dict.fromkeys(("cp.async.bulk", "cp.async.bulk.commit_group", "cp.async.bulk.wait_group"), _COPIES),
    **dict.fromkeys(
        ("cp.async.bulk.tensor", "cp.async.bulk.prefetch.L2", "cp.async.bulk.prefetch.tensor"), _COPIES
    ),
    **dict.fromkeys(("tensormap.cp_fenceproxy", "tensormap.replace.tile"), _COPIES),
    **dict.fromkeys(("griddepcontrol.launch_dependents", "griddepcontrol.wait"), _CONTROL),
    **dict.fromkeys(("setmaxnreg.dec.sync.aligned", "setmaxnreg.inc.sync.aligned"), _CONTROL),
    **dict.fromkeys(("nanosleep", "pmevent", "brkpt"), _CONTROL),
    "applypriority": _HINT,
    "call": "printf and __assertfail, whose effects are the host's; other calls are gone once it is parsed",
    "clusterlaunchcontrol.try_cancel": _CLUSTER_LAUNCH,
    **{
        f"clusterlaunchcontrol.query_cancel.{name}.b128": _CLUSTER_LAUNCH
        for name in (
            "is_canceled.pred",
            "get_first_ctaid.v4.b32",
            *(f"get_first_ctaid::{axis}.b32" for axis in "xyz"),
        )
    },
}

# Forms that sm_90a does not have, or ptxas does not take: regular expression of the opcode -> why.
FORMS = {
    r".*\.f32x2": "pairs of f32: SM 10.0",
    r"(add|sub|fma)\..*f32\.(f16|bf16)": "mixed precision: SM 10.0",
    r"cvt\..*(e2m1|e2m3|e3m2|s2f6|ue8m0).*": "6-bit, 4-bit and scale formats: SM 10.0a, 12.0a",
    r"cvt\.rs\..*": "stochastic rounding: SM 10.0a",
    r"cvt\..*(e4m3x2|e5m2x2)\.bf16x2|cvt\..*bf16x2\.(e4m3x2|e5m2x2)": "FP8 to and from bf16: SM 10.0a",
    r"cvt\..*bf16x2\.(e4m3x4|e5m2x4)": "FP8 quadruples: SM 10.0a",
    r"cvt\.(rn|rz)\..*satfinite.*\.tf32\.f32|cvt\.(rn|rz)\.satfinite\.tf32\.f32": "SM 10.0",
    r"cvt\..*(bf16\.[us]8|[us]8\.bf16)": "no such form in ptxas",
    r"cvt\..*sat\.([us]\d+|f16|f32|f64)\.bf16": "no such form in ptxas",
    **{
        rf"cvt\.sat\.{to}\.{source}": _NO_SATURATION
        for to in conversion.INTEGERS
        for source in conversion.INTEGERS
        if conversion.holds(to, source)
    },
    r"ldmatrix\..*(m16n16|m8n16).*": "8-bit, 6-bit and 4-bit matrices: SM 10.0a, 12.0a",
    r"stmatrix\..*m16n8.*": "8-bit matrices: SM 10.0a, 12.0a",
    r"mma\..*kind::.*": "FP6, FP4 and block scales: SM 12.0a; test_numerics_mma has exact rationals",
}


def handlers() -> tuple[set[str], set[str]]:
    """The registry's handlers, and those of them that forms come to."""
    families.load()
    names = set(registry.implemented())
    reached = set()
    for form in tables.all_forms():
        words = form.opcode.split(".")
        prefixes = (".".join(words[:length]) for length in range(len(words), 0, -1))
        reached.add(next(prefix for prefix in prefixes if prefix in names))
    return names, reached


def exempt(opcode: str) -> str | None:
    """Why no form covers an opcode, None where one should."""
    return next((why for pattern, why in FORMS.items() if re.fullmatch(pattern, opcode)), None)


def _selections(words: Iterable[str]) -> Iterator[frozenset[str]]:
    pool = sorted(words)
    for size in range(min(len(pool), 4) + 1):
        yield from map(frozenset, combinations(pool, size))


def _accepted(
    look: object, kinds: Iterable[tuple[str, str]], modes: Iterable[str | None], words: Iterable[str]
) -> Iterator[tuple[str, str, str | None, frozenset[str]]]:
    """All combinations that a lookup of the numerics takes."""
    modes, choices = list(modes), list(_selections(words))
    for first, second in kinds:
        for mode in modes:
            for flags in choices:
                try:
                    look(first, second, mode, flags)  # type: ignore[operator]
                except Unsupported:
                    continue
                yield first, second, mode, flags


def numerics() -> Iterator[tuple[str, frozenset[str]]]:
    """Every form that the numerics of the emulator compute: an opcode as PTX writes it, and its words."""
    operations = [
        "add",
        "sub",
        "mul",
        "fma",
        "mad",
        "div",
        "rcp",
        "sqrt",
        "rsqrt",
        "sin",
        "cos",
        "lg2",
        "ex2",
    ]
    operations += ["tanh", "min", "max", "neg", "abs", "copysign"]
    types = ["f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "f32x2", "f32.f16", "f32.bf16"]
    kinds = [(op, type_) for op in operations for type_ in types]
    modes = (None, "rn", "rz", "rm", "rp", "approx", "full")
    for op, type_, mode, flags in _accepted(
        arith.lookup, kinds, modes, ("ftz", "sat", "relu", "NaN", "xorsign", "abs")
    ):
        if op in ("min", "max") and flags & {"xorsign", "abs"} == {"abs"}:
            continue  # of three operands: SM 10.0
        yield _opcode(op, mode, flags, type_)
    integers = [f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)]
    singles = ["f16", "bf16", "f32", "f64", "tf32"]
    narrow = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]
    packed = ["f16x2", "bf16x2", "ue8m0x2", "s2f6x2", *(f"{n}x{c}" for n in narrow for c in (2, 4))]
    everything = [*integers, *singles, *packed]
    modes = (None, "rn", "rna", "rz", "rm", "rp", "rs", "rni", "rzi", "rmi", "rpi")
    pairs = [(to, source) for to in everything for source in everything]
    words = ("ftz", "sat", "satfinite", "relu", "scaled::n2::ue8m0")
    for to, source, mode, flags in _accepted(convert.lookup, pairs, modes, words):
        yield _opcode("cvt", mode, flags, f"{to}.{source}")


def _opcode(op: str, mode: str | None, flags: frozenset[str], type_: str) -> tuple[str, frozenset[str]]:
    words = [op, *([mode] if mode else []), *sorted(flags), *type_.split(".")]
    return ".".join(words), frozenset(words) | {type_}


def matrices() -> Iterator[str]:
    """Every form of ldmatrix, stmatrix and mma.sync that the numerics compute."""
    for shape in ("m8n8", "m16n16", "m8n16", "m16n8"):
        for number in ("x1", "x2", "x4"):
            for trans in ("", ".trans"):
                for kind, source in (
                    ("b16", None),
                    ("b8", None),
                    ("b8x16", "b6x16_p32"),
                    ("b8x16", "b4x16_p64"),
                ):
                    tail = f"{shape}.{number}{trans}.shared.{kind}" + (f".{source}" if source else "")
                    if _takes(matrix.ldmatrix, shape, number, bool(trans), kind, source):
                        yield f"ldmatrix.sync.aligned.{tail}"
                    if source is None and _takes(matrix.stmatrix, shape, number, bool(trans), kind):
                        yield f"stmatrix.sync.aligned.{tail}"
    types = ("f16", "bf16", "tf32", "e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "s8", "u8")
    for shape in ("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m16n8k64"):
        for kind in ("", "f8f6f4", "mxf8f6f4", "mxf4", "mxf4nvf4"):
            for a in types:
                for b in types:
                    for d in ("f16", "f32", "s32"):
                        for vector in (None, "1X", "2X", "4X"):
                            if _takes(mma.lookup, shape, kind or None, a, b, d, d, vector):
                                middle = f"kind::{kind}." if kind else ""
                                yield f"mma.sync.aligned.{shape}.row.col.{middle}{d}.{a}.{b}.{d}"


def _takes(look: object, *arguments: object) -> bool:
    try:
        look(*arguments)  # type: ignore[operator]
    except Unsupported:
        return False
    return True


def uncovered() -> list[str]:
    """Opcodes that the numerics compute, that no form has and that are not exempt."""
    opcodes = {form.opcode for form in tables.all_forms()}
    words = {_words(opcode) for opcode in opcodes}
    missing = [opcode for opcode, chosen in numerics() if chosen not in words and exempt(opcode) is None]
    return missing + [opcode for opcode in matrices() if opcode not in opcodes and exempt(opcode) is None]


def _words(opcode: str) -> frozenset[str]:
    words = opcode.split(".")
    types = 2 if words[0] == "cvt" else 1
    return frozenset(words) | {".".join(words[-types:])}
