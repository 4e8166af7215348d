"""The ctypes mirror of abi.h, abi_packed.h and abi_moe.h lays every struct out as the headers do."""

from __future__ import annotations

import copy
import ctypes
import json
import re
from pathlib import Path

import pytest

from sm12x import abi
from unit.fake_family import abi_record

ROOT = Path(__file__).resolve().parents[2]
HEADERS = [ROOT / "cuda" / "include" / "sm12x" / name for name in ("abi.h", "abi_packed.h", "abi_moe.h")]
MANIFEST = ROOT / "cubins" / "manifest.json"
SIZES = {"uint64_t": 8, "int64_t": 8, "int32_t": 4, "float": 4, "uint16_t": 2}


def header_text():
    return re.sub(r"/\*.*?\*/", "", "".join(header.read_text() for header in HEADERS), flags=re.DOTALL)


def header_constants():
    text = header_text()
    found = {name: int(value) for name, value in re.findall(r"#define (SM12X_\w+) (\d+)\s*$", text, re.M)}
    for body in re.findall(r"enum \w+ \{(.*?)\}", text, re.DOTALL):
        found.update({name: int(value) for name, value in re.findall(r"(SM12X_\w+)\s*=\s*(\d+)", body)})
    return found


def header_layouts():
    """Struct -> (size, {field: (offset, size)}), laid out by the rules of C, from the header's text alone."""
    layouts, aligns = {}, {}
    for body, struct in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", header_text(), re.DOTALL):
        offset, widest, fields = 0, 1, {}
        for declaration in filter(None, (line.strip() for line in body.split(";"))):
            forced = re.match(r"SM12X_ALIGN\((\d+)\)\s*(.*)", declaration)
            align = int(forced[1]) if forced else 1
            kind, name, count = re.fullmatch(
                r"(\w+)\s+(\w+)(?:\[(\w+)\])?", forced[2] if forced else declaration
            ).groups()
            size = SIZES[kind] if kind in SIZES else layouts[kind][0]
            align = max(align, SIZES.get(kind) or aligns[kind])
            size *= 1 if count is None else header_constants()[count] if count.isidentifier() else int(count)
            offset = -(-offset // align) * align
            fields[name] = (offset, size)
            offset, widest = offset + size, max(widest, align)
        layouts[struct], aligns[struct] = (-(-offset // widest) * widest, fields), widest
    return layouts


def test_structs_equal_the_header():
    layouts = header_layouts()
    assert set(layouts) == set(abi.STRUCTS)
    for name, (size, fields) in layouts.items():
        struct = abi.STRUCTS[name]
        assert ctypes.sizeof(struct) == size, name
        mirror = {
            key: (getattr(struct, key).offset, getattr(struct, key).size)
            for key, *_ in struct._fields_
            if not key.startswith("_")
        }
        assert mirror == fields, name


def test_constants_equal_the_header():
    header = header_constants()
    assert len(header) > 20
    assert abi.constants() == header


@pytest.mark.parametrize("groups", [0, 1, 3, 4, 5, 128, 257, 1024])
def test_group_arrays_hold_every_array_without_overlap(groups):
    padded = abi.groups_padded(groups)
    assert padded % 4 == 0
    assert groups <= padded < groups + 4
    # The last array, three int32 for each group, ends where the status word begins.
    assert abi.SM12X_OFFSET_SHAPE * padded + 12 * padded == abi.status_offset(groups)
    assert abi.group_arrays_bytes(groups) == abi.status_offset(groups) + 16


@pytest.mark.skipif(not MANIFEST.exists(), reason="cubins/manifest.json is not built")
def test_mirror_equals_what_the_build_read_from_the_compiled_header():
    assert abi.mismatches(json.loads(MANIFEST.read_text())["abi"]) == []


def test_a_record_of_the_mirror_matches():
    assert abi.mismatches(abi_record()) == []


def test_every_kind_of_difference_is_found():
    good = abi_record()

    def changed(edit):
        record = copy.deepcopy(good)
        edit(record)
        return " ".join(abi.mismatches(record))

    packed = "sm12x_prepare_packed_params"
    assert "168" in changed(lambda r: r["structs"][packed].update(size=176))
    assert f"{packed}.rows" in changed(lambda r: r["structs"][packed]["fields"].update(rows=[72, 8]))
    assert f"{packed}.extra" in changed(lambda r: r["structs"][packed]["fields"].update(extra=[168, 4]))
    assert "not in the manifest" in changed(lambda r: r["structs"].pop(packed))
    assert "not in the mirror" in changed(lambda r: r["structs"].update(other={"size": 1, "fields": {}}))
    assert "SM12X_LIST_CAPACITY" in changed(lambda r: r["constants"].update(SM12X_LIST_CAPACITY=341))
    assert "SM12X_NEW" in changed(lambda r: r["constants"].update(SM12X_NEW=1))
