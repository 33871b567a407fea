"""Readers of text and bytes under Hypothesis: accepted input is read as an independent reader does."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from zimage_rt.batch.rows import Template
from zimage_rt.bundle.json_codec import from_json, parse_json, to_json
from zimage_rt.bundle.manifest import ShapeRange, TensorSpec
from zimage_rt.bundle.onnx_files import external_files
from zimage_rt.errors import ManifestError, RequestError
from zimage_rt.image.convert import read_image
from zimage_rt.request.values import NUMBER, NUMBERS, WHOLE, read_value

# Tests in CI are the same every time, and have no database of their own.
quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@quick
@given(json_values)
def test_json_that_is_written_is_read(value: Any) -> None:
    try:
        text = json.dumps(value).encode()
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="half a surrogate pair"):
            parse_json(text)
        return
    assert parse_json(text) == value


@quick
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_other_text_is_refused_or_read_as_python_reads_it(text: bytes | str) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert value == json.loads(text)


@quick
@given(json_values)
def test_dataclasses_are_read_from_what_they_write_and_from_nothing_else(value: Any) -> None:
    for kind in (TensorSpec, ShapeRange):
        try:
            read = from_json(kind, value, "here", ManifestError)
        except ManifestError as error:
            assert "here" in str(error)
        else:
            assert {**to_json(read), **value} == to_json(read)


@quick
@given(st.text(max_size=20))
def test_numbers_are_read_as_they_are_written(text: str) -> None:
    for kind in (WHOLE, NUMBER, NUMBERS):
        try:
            read = read_value("column", kind, text)
        except RequestError as error:
            assert "column" in str(error)
            continue
        for number in read if isinstance(read, tuple) else (read,):
            assert math.isfinite(number)


@quick
@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63), 2**64))
def test_every_number_that_python_writes_is_read(number: float, whole: int) -> None:
    assert read_value("column", NUMBER, repr(number)) == number
    assert read_value("column", WHOLE, str(whole)) == whole


@quick
@given(st.text(max_size=30), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_a_template_fills_in_what_the_row_has(text: str, values: dict[str, str]) -> None:
    try:
        template = Template(text)
        filled = template.fill(values)
    except RequestError:
        return
    if not template.columns:
        assert filled == text.replace("{{", "{").replace("}}", "}")
    assert all(values[name].strip() in filled for name in template.columns)


@quick
@given(arrays.arrays(arrays.scalar_dtypes(), arrays.array_shapes(min_dims=1, max_dims=4, max_side=5)))
def test_arrays_are_read_by_their_range(array: np.ndarray) -> None:
    try:
        image = np.asarray(read_image(array, "image"))
    except RequestError as error:
        assert "image" in str(error)
        return
    scale = {"uint8": 1.0, "uint16": 255 / 65535}.get(array.dtype.name, 255.0)
    assert np.abs(image - array.astype(np.float64).reshape(image.shape) * scale).max(initial=0) <= 0.51


@quick
@given(st.binary(max_size=200))
def test_bytes_that_are_no_graph_name_no_file_or_are_refused(content: bytes) -> None:
    try:
        assert all(isinstance(name, str) for name in external_files(content))
    except ValueError:
        return
