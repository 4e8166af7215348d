"""Reading PTX: every shipped text, the grammar around it, and clear errors for what is not implemented."""

from __future__ import annotations

import re

import numpy as np
import pytest

from emulated.kernels import Machine, kernel, line_of, ptx
from sm12x import manifest
from sm12x.emulator import cfg, registry
from sm12x.emulator.errors import EmulatorError
from sm12x.emulator.launch import launch, load
from sm12x.emulator.memory import GlobalMemory
from sm12x.emulator.ptx import ir, parse

SHIPPED = [(v.key, arch) for v in manifest.default().variants.values() for arch in v.targets]


@pytest.mark.parametrize(("key", "arch"), SHIPPED)
def test_every_shipped_ptx_is_read_and_its_kernel_compiled(key, arch):
    text = ptx(key, arch)
    module = load(text, GlobalMemory())
    variant = manifest.default().variants[key]
    program = module.kernel(variant.symbol)
    # Statements as a plain scan counts them: lines that end with a semicolon and are no declaration or
    # directive.
    body = re.sub(r"//[^\n]*", "", text[text.index(".entry") :])
    body = body[body.index("{") :]
    statements = [s.strip() for s in re.sub(r'\.pragma "[^"]*";', "", body).split(";")]
    code = [
        s
        for s in statements
        if s.strip("{} \n\t") and not re.match(r"([{}\s]|[\w$]+:)*\.(reg|shared|local)\b", s)
    ]
    assert len(program.kernel.instructions) == len(code) > 50
    assert np.prod(program.kernel.directives["maxntid"]) == variant.threads
    assert module.ir.target == (arch,)


def test_all_shipped_texts_are_covered():
    assert len(SHIPPED) >= 42


def only(body, **arguments):
    return next(iter(parse(kernel(body, **arguments)).kernels.values()))


def test_scopes_hide_registers_and_labels_of_the_same_name():
    found = only("""
    .reg .b32 x;
    mov.b32 x, 1;
    { .reg .b32 x;
      AGAIN: mov.b32 x, 2;
      bra AGAIN; }
    { AGAIN: mov.b32 x, 3;
      bra AGAIN;
      bra OUTER; }
    OUTER: mov.b32 x, 4;
    """)
    registers = [i.operands[0] for i in found.instructions if i.opcode[0] == "mov"]
    assert registers[0] == registers[2] == registers[3] != registers[1]
    assert [i.operands[0].target for i in found.instructions if i.opcode[0] == "bra"] == [1, 3, 6]


def test_operands():
    found = only("""
    @!%p1 setp.lt.and.s32 %p2|%p3, %r1, -5, !%p4;
    ld.global.v2.b32 {%r1, _}, [%rd1+-8];
    mov.f32 %f1, 0f3F800000;
    mov.f64 %d1, -1.5;
    mov.b32 %r1, box+12;
    cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {%r1, 7}], [box];
    and.b32 %r1, %r2, 0b1010;
    and.b32 %r1, %r2, 017;
    and.b32 %r1, %r2, 0xFFU;
    """, shared=".shared .align 4 .b8 box[16];")  # fmt: skip
    code = found.instructions
    assert (code[0].guard.name, code[0].guard_negated) == ("%p1", True)
    assert [type(code[0].operands[at]) for at in (0, 3)] == [ir.Pair, ir.Negated]
    assert code[0].operands[2] == ir.Immediate(-5)
    assert isinstance(code[1].operands[0].elements[1], ir.Sink)
    assert code[1].operands[1].offset == -8
    assert code[2].operands[1] == ir.Immediate(0x3F800000, 32)
    assert code[3].operands[1] == ir.Immediate(int(np.float64(-1.5).view(np.uint64)), 64)
    assert code[4].operands[1] == ir.Symbol("box", 12)
    assert len(code[5].operands[0].coordinates) == 2
    assert [i.operands[2].value for i in code[6:9]] == [10, 15, 255]


def test_variables_are_laid_out_and_initialised():
    memory = GlobalMemory()
    text = """
    .version 9.0
    .target sm_120a
    .address_size 64
    .global .align 8 .u64 pointer = words+4;
    .global .align 4 .b32 words[4] = {1, -2, 0x10};
    .global .f32 number = 1.5;
    .const .align 2 .b16 table[3] = {7, 8};
    .extern .shared .align 128 .b8 dynamic[];
    .visible .entry test(.param .u32 a, .param .align 16 .b8 b[24], .param .u8 c) {
        .shared .align 16 .b8 first[20];
        .shared .b64 second;
        ret;
    }
    """
    module = load(text, memory)
    layout = module.kernel("test").layout
    assert np.frombuffer(memory.read(module.addresses["words"], 16), np.int32).tolist() == [1, -2, 16, 0]
    assert (
        int.from_bytes(memory.read(module.addresses["pointer"], 8), "little") == module.addresses["words"] + 4
    )
    assert memory.read(module.addresses["number"], 4) == np.float32(1.5).tobytes()
    assert module.constants.data.tobytes() == b"\7\0\10\0\0\0"
    assert [layout.addresses[name] for name in "abc"] == [0, 16, 40]
    assert layout.parameter_bytes == 41
    assert layout.addresses["second"] - layout.addresses["first"] == 24
    assert layout.static_shared == 32
    assert layout.addresses["dynamic"] == layout.dynamic_shared == 1024 + 128


@pytest.mark.parametrize(
    ("body", "message", "pattern"),
    [
        ("mov.b32 %r1, %r99;", "no register is named '%r99'", "r99"),
        ("bra NOWHERE;", "no register, variable or label is named 'NOWHERE'", "NOWHERE"),
        ("mov.b32 %r1, `;", "not PTX", "`"),
        ("mov.b32 %r1 2;", "expected ','", r"%r1 2"),
        ("wgmma.fence.sync.aligned;", r"wgmma.fence.sync.aligned is not implemented", "wgmma"),
        ("mapa.shared::cta.u32 %r1, %r2, 0;", "not implemented", "mapa"),
        ("add.b32 %r1, %r1, %r2;", "not implemented", "add.b32"),
        ("ld.global.b128 %rd1, [%rd2];", "not implemented: a .b128 result in register %rd1", "b128"),
        ("ld.global.v2.b128 {%rd1, %rd3}, [%rd2];", "not implemented: a vector of .b128", "b128"),
        ("add.u64 %rd1, %r1, %rd2;", "register %r1 is .b32, not .u64", "add.u64"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
         "[%r1], [%rd1, {%r1, %r1}], [%r2], %h1;", "not implemented", "multicast"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f1};", "not impl", "mma"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_or_run_is_named_with_its_line(body, message, pattern):
    text = kernel(body)
    with pytest.raises(EmulatorError, match=message) as caught:
        Machine().program(text)
    assert caught.value.line == line_of(text, pattern)


def test_the_post_dominator_of_a_branch_is_where_its_ways_meet():
    found = only("""
    @%p1 bra A;
    @%p2 bra B;
    mov.b32 %r1, 1;
    B: mov.b32 %r1, 2;
    A: mov.b32 %r1, 3;
    LOOP: mov.b32 %r1, 4;
    @%p3 bra LOOP;
    mov.b32 %r1, 5;
    """)
    blocks = cfg.build(found)
    start = {block.start: block for block in blocks}
    meets = {at: blocks[start[at].reconverge].start for at in (0, 1, 5)}
    assert meets == {0: 4, 1: 3, 5: 7}


def test_opcodes_are_found_by_their_longest_beginning():
    names = registry.implemented()
    assert {"mma.sync.aligned", "cp.async.bulk.tensor", "cp.async.bulk", "ld"} <= set(names)
    with pytest.raises(ValueError, match="two handlers for ld"):
        registry.instruction("ld")(lambda i, e: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (0, 1, 1)}, "grid"),
        ({"block": (33, 1, 1)}, "block: test has .maxntid"),
        ({"shared": 101_377}, "shared_bytes: expected at most 101376"),
    ],
)
def test_launches_that_cuda_would_refuse(change, message):
    text = kernel("").replace(")\n{", ")\n.maxntid 32, 1, 1\n{", 1)
    arguments = {"grid": (1, 1, 1), "block": (32, 1, 1), "shared": 0} | change
    with pytest.raises(ValueError, match=message):
        Machine().run(text, arguments["grid"], arguments["block"], shared=arguments["shared"])


def test_a_kernel_without_an_end_is_stopped():
    with pytest.raises(EmulatorError, match="livelock.*which is the limit\n.*runs at PTX line") as caught:
        Machine().run(kernel("AGAIN: bra AGAIN;"), 1, 32, limit=1000)
    assert caught.value.violation.kind == "livelock"


@pytest.mark.parametrize("resident", [1, 2, 5, None])
def test_every_cta_is_let_in_once(resident):
    machine = Machine()
    counters = machine.upload(np.zeros(12, np.uint32), "counters")
    text = kernel(f"""
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mad.lo.u32 %r1, %r2, 4, %r1;
    mul.wide.u32 %rd1, %r1, 4;
    add.u64 %rd1, %rd1, {counters};
    add.u32 %r2, %r1, 1;
    red.global.add.u32 [%rd1], %r2;
    """)
    launch(machine.program(text), (4, 3, 1), (1, 1, 1), 0, b"", memory=machine.memory, resident=resident)
    assert machine.download(counters, (12,), np.uint32).tolist() == list(range(1, 13))


@pytest.mark.parametrize("resident", [1, 2, None])
def test_a_grid_that_needs_all_its_ctas_at_once_fails_where_they_are_not_let_in(resident):
    """Each CTA counts itself in and waits for all four."""
    machine = Machine()
    counter = machine.upload(np.zeros(1, np.uint32), "counter")
    text = kernel(f"""
    mov.u64 %rd1, {counter};
    mov.b32 %r2, 1;
    atom.global.add.u32 %r1, [%rd1], %r2;
AGAIN:
    ld.acquire.gpu.global.b32 %r1, [%rd1];
    setp.lt.u32 %p1, %r1, 4;
    @%p1 bra AGAIN;
    """)

    def run():
        return launch(machine.program(text), (4, 1, 1), (1, 1, 1), 0, b"", memory=machine.memory,
                      segment_limit=20_000, resident=resident)  # fmt: skip

    if resident is None:
        run()
    else:
        with pytest.raises(EmulatorError, match=f"livelock[^$]*{4 - resident} CTAs have not been let in"):
            run()
