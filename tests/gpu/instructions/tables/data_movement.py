"""mov, ld, st, cvta and kin (PTX ISA 9.7.9)."""

from __future__ import annotations

from collections.abc import Iterator

from ..forms import Form, simple

VALUES = ("b8", "u8", "s8", "b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64")
VECTORS = (
    ("b8", 2),
    ("b8", 4),
    ("b16", 2),
    ("b16", 4),
    ("b32", 2),
    ("b32", 4),
    ("b64", 2),
    ("f32", 4),
    ("f64", 2),
)
# how a load or store of global memory may be marked; none of it changes what a lone thread sees
LOADS = (
    *("ca", "cg", "cs", "lu", "cv", "nc", "relaxed.gpu", "acquire.gpu", "relaxed.sys", "volatile", "weak"),
    *("L1::evict_first", "L1::no_allocate", "L2::128B", "nc.L1::no_allocate.L2::256B"),
)
STORES = ("wb", "cg", "cs", "wt", "relaxed.cta", "release.gpu", "volatile", "weak", "L1::no_allocate")


def registers(letter: str, count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"{{{letter}{first + n}}}" for n in range(count)) + "}"


def forms() -> Iterator[Form]:
    for kind in ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f32", "f64", "pred"):
        yield simple(f"mov.{kind}", kind, kind)
    for kind, part, count in (("b32", "b16", 2), ("b64", "b32", 2), ("b64", "b16", 4)):
        code = f"mov.{kind} {{d0}}, {registers('a', count)};"
        yield Form(f"mov.{kind} packs {count}", code, (part,) * count, (kind,))
        code = f"mov.{kind} {registers('d', count)}, {{a0}};"
        yield Form(f"mov.{kind} unpacks {count}", code, (kind,), (part,) * count)
    for space, place in ((".global", "memory"), (".shared", "box"), (".shared::cta", "box"), ("", "memory")):
        for kind in VALUES:
            yield _load(f"ld{space}.{kind}", place, kind)
            yield _store(f"st{space}.{kind}", place, kind)
        for part, count in VECTORS:
            yield _vector_load(f"ld{space}.v{count}.{part}", place, part, count)
            yield _vector_store(f"st{space}.v{count}.{part}", place, part, count)
    for words in LOADS:
        opcode = f"ld.{_ordered(words, 'global')}.b32"
        yield _read_only(opcode) if "nc" in words.split(".") else _load(opcode, "memory", "b32")
    for words in STORES:
        yield _store(f"st.{_ordered(words, 'global')}.b32", "memory", "b32")
    yield _load("ldu.global.b32", "memory", "b32")
    for kind in ("u8", "s16", "b32", "b64"):  # the address of an operand decides what is loaded
        yield _local(kind)
    yield from _addresses()


def _ordered(words: str, space: str) -> str:
    """Modifiers with the space in its place: behind those of memory order, before those of caches."""
    head, _, rest = words.partition(".L")
    if head.startswith("L"):
        return f"{space}.{words}"
    if head.split(".")[0] in ("relaxed", "acquire", "release", "volatile", "weak"):
        return f"{head}.{space}" + (f".L{rest}" if rest else "")
    return f"{space}.{words}"


def _load(opcode: str, place: str, kind: str) -> Form:
    """Eight bytes are stored, and the first of them loaded; into a register of 64 bits for integers too."""
    code = f"st.{'global' if place == 'memory' else 'shared'}.b64 [{{{place}}}+8], {{a0}};\n"
    code += f"{opcode} {{d0}}, [{{{place}}}+8];"
    results: tuple[str, ...] = (kind,)
    if kind[0] != "f" and "ldu" not in opcode:
        code += f"\n{opcode} {{d1}}, [{{{place}}}+8];"
        results = (kind, "b64")
    return Form(opcode, code, ("b64",), results)


def _read_only(opcode: str) -> Form:
    """Of an operand, which nothing writes. .nc may "cache in non-coherent read-only cache" (PTX ISA,
    "ld.global.nc"): of what the kernel itself wrote an H200 gives the old value.
    """
    code = f"{opcode} {{d0}}, [{{source}}];\n{opcode} {{d1}}, [{{source}}];"
    return Form(opcode, code, ("b64",), ("b32", "b64"))


def _store(opcode: str, place: str, kind: str) -> Form:
    """A store into eight bytes, all of which are read back."""
    space = "global" if place == "memory" else "shared"
    code = f"st.{space}.b64 [{{{place}}}+16], {{a0}};\n{opcode} [{{{place}}}+16], {{a1}};\n"
    return Form(opcode, code + f"ld.{space}.b64 {{d0}}, [{{{place}}}+16];", ("b64", kind), ("b64",))


def _vector_load(opcode: str, place: str, part: str, count: int) -> Form:
    space = "global" if place == "memory" else "shared"
    code = f"st.{space}.v2.b64 [{{{place}}}+32], {registers('a', 2)};\n"
    code += f"{opcode} {registers('d', count)}, [{{{place}}}+32];"
    return Form(opcode, code, ("b64", "b64"), (part,) * count)


def _vector_store(opcode: str, place: str, part: str, count: int) -> Form:
    space = "global" if place == "memory" else "shared"
    code = f"st.{space}.v2.b64 [{{{place}}}+48], {registers('a', 2)};\n"
    code += f"{opcode} [{{{place}}}+48], {registers('a', count, 2)};\n"
    code += f"ld.{space}.v2.b64 {registers('d', 2)}, [{{{place}}}+48];"
    return Form(opcode, code, ("b64", "b64", *(part,) * count), ("b64", "b64"))


def _local(kind: str) -> Form:
    """A place in local memory that another operand chooses, so that it cannot become a register."""
    code = ".local .align 8 .b8 own[64];\n"
    for n in range(2):
        code += f"st.local.b64 [own+{8 * n}], {{a{n}}};\n"
    code += "mov.u32 %t2, own;\nand.b32 %t3, {a2}, 1;\nmad.lo.u32 %t2, %t3, 8, %t2;\n"
    return Form(f"ld.local.{kind}", code + f"ld.local.{kind} {{d0}}, [%t2];", ("b64", "b64", "b32"), (kind,))


def _addresses() -> Iterator[Form]:
    """What comes back through an address that was converted there and back."""
    keep = "st.shared.b32 [{box}], {a0};\ncvt.u64.u32 %q1, {box};\n"
    code = keep + "cvta.shared.u64 %q2, %q1;\nld.b32 {d0}, [%q2];"
    yield Form("cvta.shared.u64", code, ("b32",), ("b32",))
    code = keep + "cvta.shared.u64 %q2, %q1;\ncvta.to.shared.u64 %q3, %q2;\nsub.u64 {d0}, %q3, %q1;"
    yield Form("cvta.to.shared.u64", code, ("b32",), ("b64",))
    code = "st.global.b32 [{memory}], {a0};\ncvta.global.u64 %q1, {memory};\nld.b32 {d0}, [%q1];"
    yield Form("cvta.global.u64", code, ("b32",), ("b32",))
    code = "st.b32 [{memory}], {a0};\ncvta.to.global.u64 %q1, {memory};\nld.global.b32 {d0}, [%q1];"
    yield Form("cvta.to.global.u64", code, ("b32",), ("b32",))
    for space in ("global", "shared"):  # a generic address of either memory, by turns
        code = "cvt.u64.u32 %q1, {box};\ncvta.shared.u64 %q2, %q1;\nand.b32 %t2, {a0}, 1;\n"
        code += "setp.eq.u32 %c0, %t2, 0;\nselp.b64 %q3, %q2, {memory}, %c0;\n"
        yield Form(f"isspacep.{space}", code + f"isspacep.{space} {{d0}}, %q3;", ("b32",), ("pred",))
    code = "st.shared.b32 [{box}], {a0};\nmapa.shared::cluster.u32 %t2, {box}, 0;\n"
    yield Form("mapa.shared::cluster.u32", code + "ld.shared::cluster.b32 {d0}, [%t2];", ("b32",), ("b32",))
    code = "getctarank.shared::cluster.u32 {d0}, {box};\nst.shared.b32 [{box}], {a0};"
    yield Form("getctarank.shared::cluster.u32", code, ("b32",), ("u32",))
    code = "createpolicy.fractional.L2::evict_first.b64 %q1, 1.0;\nst.global.b32 [{memory}], {a0};\n"
    code += "ld.global.L2::cache_hint.b32 {d0}, [{memory}], %q1;"
    yield Form("createpolicy.fractional.L2::evict_first.b64", code, ("b32",), ("b32",))
    for opcode in ("prefetch.global.L2", "prefetch.L1", "prefetchu.L1"):
        code = f"st.global.b32 [{{memory}}], {{a0}};\n{opcode} [{{memory}}];\n"
        code += "ld.global.b32 {d0}, [{memory}];"
        yield Form(opcode, code, ("b32",), ("b32",))
