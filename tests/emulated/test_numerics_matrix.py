"""ldmatrix, stmatrix and movmatrix against the figures of the PTX ISA, element by element."""

from __future__ import annotations

import numpy as np
import pytest

from sm12x.emulator.numerics.matrix import ldmatrix, movmatrix, stmatrix
from sm12x.emulator.numerics.unsupported import Unsupported

NUMBERS = {"x1": 1, "x2": 2, "x4": 4}


def scattered(rng, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A memory of random bytes, and 32 row addresses in no order; lanes beyond ``rows`` point nowhere."""
    memory = rng.integers(0, 256, size=4096, dtype=np.uint8)
    addresses = rng.permutation(256)[:32].astype(np.uint64) * 16
    addresses[rows:] = 1 << 40
    return memory, addresses


def load(form, memory, addresses) -> np.ndarray:
    return form.fragments(memory[form.addresses(addresses)])


def unpacked(row: np.ndarray, source: str | None) -> list[int]:
    """The 16 elements of a row as bytes (Optional Decompression: elements from bit 0 up, then padding)."""
    bits = {None: 8, "b6x16_p32": 6, "b4x16_p64": 4}[source]
    whole = int.from_bytes(row.tobytes(), "little")
    return [whole >> (bits * i) & ((1 << bits) - 1) for i in range(16)]


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
def test_ldmatrix_m8n8_b16(number, trans):
    """Figure 104: lane 4 * r + c has elements 2c, 2c + 1 of row r (of the transposed matrix with .trans)."""
    seed = 20
    print("seed", seed)
    count = NUMBERS[number]
    memory, addresses = scattered(np.random.default_rng(seed), 8 * count)
    form = ldmatrix("m8n8", number, trans, "b16")
    assert (form.registers, form.rows, form.bytes_per_row) == (count, 8 * count, 16)
    got = load(form, memory, addresses)
    assert got.shape == (count, 32)
    assert got.dtype == np.uint32
    for m in range(count):
        rows = [memory[int(a) : int(a) + 16].view(np.uint16) for a in addresses[8 * m : 8 * m + 8]]
        for lane in range(32):
            r, c = lane // 4, 2 * (lane % 4)
            pair = [rows[c][r], rows[c + 1][r]] if trans else [rows[r][c], rows[r][c + 1]]
            assert got[m, lane] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("source", [None, "b6x16_p32", "b4x16_p64"])
@pytest.mark.parametrize("number", ["x1", "x2"])
def test_ldmatrix_m16n16_transposed(number, source):
    """Figure 105: lane 4 * g + t has columns 4t to 4t + 3 of row g in r0 and of row g + 8 in r1, after
    transposition.
    """
    seed = 21
    print("seed", seed)
    count = NUMBERS[number]
    memory, addresses = scattered(np.random.default_rng(seed), 16 * count)
    form = ldmatrix("m16n16", number, True, "b8x16" if source else "b8", source)
    assert (form.registers, form.rows) == (2 * count, 16 * count)
    assert form.bytes_per_row == {None: 16, "b6x16_p32": 12, "b4x16_p64": 8}[source]
    got = load(form, memory, addresses)
    for m in range(count):
        rows = [unpacked(memory[int(a) : int(a) + 16], source) for a in addresses[16 * m : 16 * m + 16]]
        for lane in range(32):
            g, t = lane // 4, lane % 4
            for half in range(2):
                want = [rows[4 * t + j][g + 8 * half] for j in range(4)]
                assert list(got[2 * m + half, lane : lane + 1].view(np.uint8)) == want


@pytest.mark.parametrize("source", ["b6x16_p32", "b4x16_p64"])
@pytest.mark.parametrize("number", NUMBERS)
def test_ldmatrix_m8n16_unpacks(number, source):
    """Figure 106: lane 4 * g + t has columns 4t to 4t + 3 of row g, in the low bits of bytes."""
    seed = 22
    print("seed", seed)
    count = NUMBERS[number]
    memory, addresses = scattered(np.random.default_rng(seed), 8 * count)
    form = ldmatrix("m8n16", number, False, "b8x16", source)
    assert (form.registers, form.rows) == (count, 8 * count)
    got = load(form, memory, addresses)
    for m in range(count):
        rows = [unpacked(memory[int(a) : int(a) + 16], source) for a in addresses[8 * m : 8 * m + 8]]
        for lane in range(32):
            g, t = lane // 4, lane % 4
            assert list(got[m, lane : lane + 1].view(np.uint8)) == rows[g][4 * t : 4 * t + 4]


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
def test_stmatrix_is_the_inverse_of_ldmatrix(number, trans):
    seed = 23
    print("seed", seed)
    rng = np.random.default_rng(seed)
    count = NUMBERS[number]
    registers = rng.integers(0, 1 << 32, size=(count, 32), dtype=np.uint32)
    _, addresses = scattered(rng, 8 * count)
    memory = np.zeros(4096, dtype=np.uint8)
    store = stmatrix("m8n8", number, trans, "b16")
    assert (store.registers, store.rows, store.bytes_per_row) == (count, 8 * count, 16)
    memory[store.addresses(addresses)] = store.row_bytes(registers)
    np.testing.assert_array_equal(load(ldmatrix("m8n8", number, trans, "b16"), memory, addresses), registers)


@pytest.mark.parametrize("number", NUMBERS)
def test_stmatrix_m16n8_b8_stores_columns(number):
    """Figure 108: bytes 0 and 1 of lane 4 * g + t are columns 2t, 2t + 1 of row g, bytes 2 and 3 of row g +
    8.
    """
    seed = 24
    print("seed", seed)
    rng = np.random.default_rng(seed)
    count = NUMBERS[number]
    registers = rng.integers(0, 1 << 32, size=(count, 32), dtype=np.uint32)
    form = stmatrix("m16n8", number, True, "b8")
    rows = form.row_bytes(registers)
    assert rows.shape == (8 * count, 16)
    for m in range(count):
        for lane in range(32):
            g, t = lane // 4, lane % 4
            e = registers[m, lane : lane + 1].view(np.uint8)
            column = rows[8 * m + 2 * t], rows[8 * m + 2 * t + 1]  # a column of the matrix is a row in memory
            assert [column[0][g], column[1][g], column[0][g + 8], column[1][g + 8]] == list(e)


def test_movmatrix_transposes():
    seed = 25
    print("seed", seed)
    register = np.random.default_rng(seed).integers(0, 1 << 32, size=32, dtype=np.uint32)
    before, after = register.view(np.uint16).reshape(8, 8), movmatrix(register).view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(after, before.T)


@pytest.mark.parametrize(
    "form",
    [("m8n8", "x4", True, "b16"), ("m16n16", "x2", True, "b8"), ("m8n16", "x4", False, "b8x16", "b6x16_p32")],
)
def test_leading_axes_are_separate_instructions(form):
    seed = 26
    print("seed", seed)
    load_form = ldmatrix(*form)
    size = (3, load_form.rows, load_form.bytes_per_row)
    rows = np.random.default_rng(seed).integers(0, 256, size=size, dtype=np.uint8)
    together = load_form.fragments(rows)
    for i in range(3):
        np.testing.assert_array_equal(together[i], load_form.fragments(rows[i]))
    store = stmatrix("m8n8", "x4", True, "b16") if form[0] == "m8n8" else stmatrix("m16n8", "x4", True, "b8")
    registers = together[:, :4]
    together = store.row_bytes(registers)
    for i in range(3):
        np.testing.assert_array_equal(together[i], store.row_bytes(registers[i]))


@pytest.mark.parametrize(
    "form",
    [
        ("m8n8", "x3", False, "b16"),
        ("m8n8", "x1", False, "b8"),
        ("m16n16", "x4", True, "b8"),
        ("m16n16", "x1", False, "b8"),
        ("m8n16", "x1", True, "b8x16", "b4x16_p64"),
        ("m8n16", "x1", False, "b8x16"),
        ("m16n16", "x1", True, "b8", "b4x16_p64"),
    ],
)
def test_forms_that_ldmatrix_lacks_are_refused(form):
    with pytest.raises(Unsupported, match=f"ldmatrix.*{form[0]}.{form[1]}"):
        ldmatrix(*form)


@pytest.mark.parametrize(
    "form", [("m16n8", "x1", False, "b8"), ("m8n8", "x1", False, "b8"), ("m8n8", "x8", False, "b16")]
)
def test_forms_that_stmatrix_lacks_are_refused(form):
    with pytest.raises(Unsupported, match=f"stmatrix.*{form[0]}.{form[1]}"):
        stmatrix(*form)
