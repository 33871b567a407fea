"""Sessions whose inputs and outputs stay where they are: on the device, at fixed addresses."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

# Sets of buffers kept: a request needs one for each module, and one more for each other size, batch or prompt length.
MAX_SHAPES = 8

# onnxruntime's run configuration: which captured CUDA graph a run replays; -1 for none.
GRAPH_ID = "gpu_graph_id"


@dataclasses.dataclass
class _Buffers:
    """What one set of input shapes runs with."""

    graph_id: int
    binding: ort.IOBinding
    inputs: dict[str, ort.OrtValue]


class BoundSession:
    """Runs a session through an IO binding, with one set of buffers for each set of input shapes.

    Nothing is allocated when shapes come again, and what a CUDA graph needs holds: addresses do not move. Threads take
    turns, since they share the buffers.

    Args:
        session: what to run.
        outputs: names of the outputs, in the order of the results.
        device_type: where the buffers lie, `cpu` or `cuda`, as onnxruntime calls it.
        device: which one.
    """

    def __init__(self, session: ort.InferenceSession, outputs: Sequence[str], device_type: str, device: int) -> None:
        self._session, self._outputs = session, outputs
        self._device_type, self._device = device_type, device
        self._buffers: OrderedDict[tuple[tuple[int, ...], ...], _Buffers] = OrderedDict()
        self._next_graph = 0
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs, as new arrays."""
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
        """Run once with outputs that onnxruntime allocates, then keep them: only the graph knows their shapes."""
        binding = self._session.io_binding()
        values = {}
        for name, array in inputs.items():
            # A copy: on the CPU the value would otherwise be the caller's own array, and be written to later.
            values[name] = ort.OrtValue.ortvalue_from_numpy(np.array(array), self._device_type, self._device)
            binding.bind_ortvalue_input(name, values[name])
        for name in self._outputs:
            binding.bind_output(name, self._device_type, self._device)
        # No graph yet: it would hold on to addresses before they are fixed.
        self._session.run_with_iobinding(binding, _run_options(-1))
        for name, value in zip(self._outputs, binding.get_outputs(), strict=True):
            binding.bind_ortvalue_output(name, value)
        self._next_graph += 1
        return _Buffers(self._next_graph, binding, values)

    def _forget_oldest(self) -> None:
        """Make room for one more."""
        while len(self._buffers) >= MAX_SHAPES:
            _, oldest = self._buffers.popitem(last=False)
            # Older versions keep a captured graph as long as the session; it is never replayed again.
            if hasattr(self._session, "release_captured_graph"):
                self._session.release_captured_graph(oldest.graph_id)


def _run_options(graph_id: int) -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph_id))
    return options
