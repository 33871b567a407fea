"""Every C++ file includes what it uses: another compiler's headers bring other headers along, or none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from shared import ROOT

# Name → the header that declares it. A file that uses the name includes the header itself.
STD_HEADERS = {
    "algorithm": r"std::(?:sort|min|max|clamp|fill|fill_n|copy|copy_n|find|find_if|any_of|all_of|none_of|replace|"
    r"min_element|max_element|transform|reverse|rotate|stable_sort|count|count_if|equal|remove_if|for_each|partition)\b",
    "array": r"std::array\b",
    "atomic": r"std::atomic\b",
    "chrono": r"std::chrono\b",
    "cmath": r"std::(?:sqrt|exp|log|cos|sin|tan|tanh|pow|abs|fabs|floor|ceil|isfinite|isnan|lround|round|fma)\b",
    "condition_variable": r"std::condition_variable\b",
    "cstddef": r"std::(?:size_t|byte|ptrdiff_t|nullptr_t)\b",
    "cstdint": r"\b(?:std::)?u?int(?:8|16|32|64)_t\b|\b(?:std::)?u?intptr_t\b",
    "cstdio": r"std::(?:rename|snprintf|FILE|fopen|fclose|fread)\b",
    "cstdlib": r"std::(?:getenv|malloc|free|abort|strtol)\b",
    "cstring": r"std::(?:memcpy|memset|memcmp|strlen|strcmp)\b",
    "exception": r"std::(?:exception|exception_ptr|current_exception|rethrow_exception|uncaught_exceptions)\b",
    "fstream": r"std::[io]?fstream\b",
    "functional": r"std::(?:function|hash|less|greater|plus|multiplies)\b",
    "initializer_list": r"std::initializer_list\b",
    "iterator": r"std::(?:back_inserter|make_move_iterator|next|prev|advance|distance)\b",
    "limits": r"std::numeric_limits\b",
    "list": r"std::list\b",
    "map": r"std::(?:multi)?map\b",
    "memory": r"std::(?:unique_ptr|shared_ptr|weak_ptr|make_unique|make_shared|addressof)\b",
    "mutex": r"std::(?:recursive_)?mutex\b|std::(?:lock_guard|unique_lock|scoped_lock|call_once|once_flag)\b",
    "numeric": r"std::(?:accumulate|iota|inner_product|partial_sum|gcd)\b",
    "optional": r"std::(?:optional|nullopt|make_optional)\b",
    "set": r"std::set\b",
    "sstream": r"std::[io]?stringstream\b",
    "stdexcept": r"std::(?:runtime_error|invalid_argument|logic_error|out_of_range|length_error|range_error)\b",
    "string": r"std::(?:string|to_string|getline|stoi|stof)\b(?!_view)",
    "string_view": r"std::string_view\b",
    "thread": r"std::thread\b|std::this_thread\b",
    "tuple": r"std::(?:tuple|make_tuple|tie|apply)\b",
    "type_traits": r"std::(?:is_same|is_same_v|enable_if_t|conditional_t|decay_t|remove_cv_t|remove_reference_t)\b",
    "unordered_map": r"std::unordered_map\b",
    "unordered_set": r"std::unordered_set\b",
    "utility": r"std::(?:move|pair|swap|exchange|forward|make_pair|index_sequence|declval)\b",
    "vector": r"std::vector\b",
}
# Names of CUDA and of our own headers.
OTHER_HEADERS = {
    r"cuda_runtime(?:_api)?\.h|device/device\.h": r"\bcuda(?:Stream|Event|Error)_t\b|\bcudaMemcpy\w*\(",
    r"device/check\.h": r"\bZRT_CUDA\(",
    r"device/dtype\.h": r"\bDType::",
    r"device/arena\.h": r"\bArena&?\s",
    r"device/matrix\.h": r"\bLayout::k",
}
FILES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cc", ".cu", ".h", ".cuh"})


def missing_includes(source: str, name: str = "") -> list[str]:
    """The headers whose names a source uses and that it does not include, each with the first use."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    included = re.findall(r'#include [<"]([^">]+)[">]', code)
    body = re.sub(r"#include[^\n]*", "", code)
    missing = []
    for header, used in (STD_HEADERS | OTHER_HEADERS).items():
        pattern = re.escape(header) if header in STD_HEADERS else header
        found = re.search(used, body)
        if found and not any(re.fullmatch(pattern, entry) for entry in included) and not re.fullmatch(pattern, name):
            missing.append(f"{header} for {found[0]}")
    return missing


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_a_file_includes_what_it_uses(path: Path) -> None:
    csrc = ROOT / "csrc"
    name = str(path.relative_to(csrc))
    source = path.read_text(encoding="utf-8")
    assert missing_includes(source, name) == []


def test_a_missing_include_is_found() -> None:
    assert missing_includes("#include <string>\nstd::string a; std::uint64_t b;") == ["cstdint for std::uint64_t"]
    assert missing_includes("#include <cstdint>\n// std::vector is not used\nstd::uint64_t b;") == []


# From the lowest up: a room of csrc/ includes headers of its own and of the rooms before it.
ROOMS = ("cpu", "device", "kernels", "weights", "ops", "models", "runtime", "bindings")


def wrong_includes(source: str, room: str) -> list[str]:
    """The headers of ours that a file of `room` may not include."""
    included = re.findall(r'#include "([^"]+)"', source)
    return [name for name in included if ROOMS.index(name.split("/")[0]) > ROOMS.index(room)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "csrc")))
def test_rooms_include_downwards(path: Path) -> None:
    room = path.relative_to(ROOT / "csrc").parts[0]
    assert wrong_includes(path.read_text(encoding="utf-8"), room) == []


def test_only_bindings_know_python() -> None:
    knowing = {path.relative_to(ROOT / "csrc").parts[0] for path in FILES if "pybind11" in path.read_text("utf-8")}
    assert knowing == {"bindings"}


def test_a_wrong_include_is_found() -> None:
    source = '#include <vector>\n#include "device/check.h"\n#include "models/block.h"\n'
    assert wrong_includes(source, "ops") == ["models/block.h"]
    assert wrong_includes(source, "models") == []
