"""TensorRT (package `tensorrt`, 10.x and 11.x): data-centre and workstation GPUs, Ampere to Blackwell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorrt as trt

from ..bundle.manifest import ModuleSpec
from ..checks import flag
from ..errors import BundleMismatch
from ._tensorrt_common import Part, TensorRTBackendBase
from ._tensorrt_plans import initializers, map_tensors
from .base import Probe


class TensorRTBackend(TensorRTBackendBase):
    """Runs a bundle's plans with TensorRT on one NVIDIA GPU.

    Args:
        device: index of the GPU.
        cuda_graph: whether to capture and replay a CUDA graph per shape that is used repeatedly; each such shape holds
            an execution context of its own.

    Raises:
        BackendUnavailable: there is no such GPU, or no driver.
    """

    name = "tensorrt"

    def __init__(self, device: int = 0, cuda_graph: bool = True) -> None:
        self.captures_graphs = flag(cuda_graph, "cuda_graph")
        super().__init__(trt, device)

    def create_context(self, part: Part) -> Any:
        """Create an execution context without device memory; see the base class."""
        return part.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def refit(self, part: Part, bundle: Path, spec: ModuleSpec) -> None:
        """Refit a stripped plan from the module's graph and its mapped weights, the same bytes as the builder parsed.

        The graph maps initializers to the engine's weights, and has the small constants that are no tensor of the
        checkpoint.
        """
        if spec.graph is None:
            raise BundleMismatch(
                f"{part.label}: its plan is stripped of weights, and the bundle has no graph to refit it by; "
                f"export it again with --backend {self.name}"
            )
        self.log.clear()
        refitter = trt.Refitter(part.engine, self.log.logger)
        parser = trt.OnnxParserRefitter(refitter, self.log.logger)
        graph, weights = (bundle / spec.graph).read_bytes(), map_tensors(bundle / spec.weights)
        done = parser.load_model_proto(graph)
        # The plan of a split module uses a part of the weights, which the parser selects.
        for name in initializers(graph, weights):
            done = done and parser.load_initializer(name, weights[name].ctypes.data, weights[name].nbytes)
        if not (done and parser.refit_model_proto() and refitter.refit_cuda_engine()):
            if self.log.out_of_memory:
                raise self.gpu.out_of_memory(f"refitting {part.label}", sum(data.nbytes for data in weights.values()))
            errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
            missing = [name for name in refitter.get_missing_weights() if name][:3]
            raise BundleMismatch(
                f"{part.label}: TensorRT cannot refit the plan from {spec.weights}: "
                f"{'; '.join(errors) or self.log.text}{f'; weights missing: {missing}' if missing else ''}; "
                "export the bundle again"
            )


def probe() -> list[Probe]:
    """The availability of TensorRT; see `Probe`."""
    return TensorRTBackend.probe(trt)
