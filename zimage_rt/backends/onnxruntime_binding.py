"""Sessions with IO binding: inputs and outputs have persistent buffers on the device, at fixed addresses."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

# Sets of buffers kept per session, one per size, batch or length of a prompt.
MAX_SHAPES = 8

# Key of onnxruntime's run configuration: the captured CUDA graph that a run replays; -1 for none.
GRAPH_ID = "gpu_graph_id"


@dataclasses.dataclass
class _Buffers:
    """The buffers of one set of input shapes."""

    graph_id: int
    binding: ort.IOBinding
    inputs: dict[str, ort.OrtValue]


class BoundSession:
    """A session with an IO binding and one set of buffers per set of input shapes.

    Repeated shapes allocate nothing, and addresses do not change, as CUDA graphs require. Concurrent calls run one
    after another, because they share the buffers.

    Args:
        session: the session.
        outputs: names of the outputs, in the order of the results.
        device_type: onnxruntime's name of the buffers' device, `cpu` or `cuda`.
        device: index of the device.
    """

    def __init__(self, session: ort.InferenceSession, outputs: Sequence[str], device_type: str, device: int) -> None:
        self._session, self._outputs = session, outputs
        self._device_type, self._device = device_type, device
        self._buffers: OrderedDict[tuple[tuple[int, ...], ...], _Buffers] = OrderedDict()
        self._next_graph = 0
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the session; returns the outputs as new arrays."""
        with self._lock:
            key = tuple(inputs[name].shape for name in sorted(inputs))
            buffers = self._buffers.get(key)
            if buffers is None:
                self._forget_oldest()
                buffers = self._buffers[key] = self._allocate(inputs)
            else:
                self._buffers.move_to_end(key)
                for name, value in buffers.inputs.items():
                    value.update_inplace(np.ascontiguousarray(inputs[name]))
                self._session.run_with_iobinding(buffers.binding, _run_options(buffers.graph_id))
            return buffers.binding.copy_outputs_to_cpu()

    def _allocate(self, inputs: Mapping[str, np.ndarray]) -> _Buffers:
        """Run once with outputs that onnxruntime allocates, and bind those: only the graph determines their shapes."""
        binding = self._session.io_binding()
        values = {}
        for name, array in inputs.items():
            # A copy: on the CPU the value would otherwise share the caller's array, which later runs overwrite.
            values[name] = ort.OrtValue.ortvalue_from_numpy(np.array(array), self._device_type, self._device)
            binding.bind_ortvalue_input(name, values[name])
        for name in self._outputs:
            binding.bind_output(name, self._device_type, self._device)
        # No graph yet: it would capture addresses before they are fixed.
        self._session.run_with_iobinding(binding, _run_options(-1))
        for name, value in zip(self._outputs, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        self._next_graph += 1
        return _Buffers(self._next_graph, binding, values)

    def _forget_oldest(self) -> None:
        """Drop the least recently used buffers until there is room for another set."""
        while len(self._buffers) >= MAX_SHAPES:
            _, oldest = self._buffers.popitem(last=False)
            # Older versions keep a captured graph until the session ends; it is not replayed again.
            if hasattr(self._session, "release_captured_graph"):
                self._session.release_captured_graph(oldest.graph_id)


def _run_options(graph_id: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph_id))
    return options
