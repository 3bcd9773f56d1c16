"""A network as an ONNX file, in float32 or with integer weights and 8-bit activations, and how to run it.

Quantized tensors are written in the QDQ form: integers between a QuantizeLinear and a DequantizeLinear node, which
a runtime may fuse into integer arithmetic. A batch norm is folded into the layer before it: its shift goes into the
bias and its scale, a factor for each output channel, into the step of that channel, so that the codes stay as they are.
"""

import operator
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn.functional import adaptive_avg_pool2d

from kure_lib.files import write_atomically
from kure_lib.networks.layers import followed
from kure_lib.networks.models import DenseGradient
from kure_lib.paths import KureError, check_known
from kure_lib.quantization.equalization import ClippedReLU
from kure_lib.quantization.integers import Integers

OPSET, IR_VERSION = 21, 10  # the first that can name 4-bit integers
BATCH = 1000  # images at a time
PASSED = (nn.Dropout, nn.Identity, DenseGradient)  # the identity when a network is used


def to_onnx(
    model: nn.Module,
    image_shape: tuple[int, ...],
    weights: Mapping[str, Integers] | None = None,
    activation_steps: Mapping[str, Tensor] | None = None,
) -> onnx.ModelProto:
    """A convolutional network in evaluation mode as an ONNX model, from images [N, *image_shape] to scores.

    `weights` gives layers as integers (see `integers.of`); up to 4 bits they are packed two in a byte. The outputs of
    the ReLUs of `activation_steps` (see `calibration.activation_steps`) become 8-bit unsigned integers. All else
    is in float32. Raises `KureError` for integers that stand for the middle of a cell, which ONNX cannot
    say, or of a layer that is not there, for control flow, and for an operation that is not known here.
    """
    writer = _Writer(model, weights or {}, activation_steps or {})
    nodes = list(followed(model, "export a network without control flow").nodes)
    layers = [node.target for node in nodes if isinstance(writer.called(node), nn.Conv2d | nn.Linear)]
    for name in writer.weights:
        check_known("layer", name, layers)
    for node in nodes:
        writer.names[node] = writer.write(node)
    return writer.finished(nodes[-1], image_shape)


def save(network: onnx.ModelProto, path: Path) -> int:
    """Write an ONNX file whole or not at all; returns its size in bytes. Raises `KureError` if it cannot be written."""
    content = network.SerializeToString()
    write_atomically(path, content)
    return len(content)


def session(path: Path, fused: bool = True) -> onnxruntime.InferenceSession:
    """An ONNX file, loaded to run on the processor; without `fused`, node by node as written.

    Raises `KureError` if the runtime refuses the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own classes are not public
        raise KureError(f"onnxruntime cannot load {path} ({error}): export it again.") from error


def scores(loaded: onnxruntime.InferenceSession, images: Tensor) -> Tensor:
    """What a loaded network says of images [N, C, H, W]: float32 [N, classes]."""
    return torch.cat([torch.from_numpy(loaded.run(None, {"images": b.numpy()})[0]) for b in images.split(BATCH)])


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _is_full_norm(module: nn.Module | None) -> bool:
    """Whether it is a batch norm with all that ONNX asks of one: scales, shifts, means and variances."""
    return isinstance(module, nn.BatchNorm2d) and module.bias is not None and module.running_mean is not None


class _Writer:
    """Writes the nodes of a traced network one by one; `names` tells what their outputs are called."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Integers], steps: Mapping[str, Tensor]):
        self.model, self.weights, self.steps = model, weights, steps
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.names: dict[fx.Node, str] = {}
        self.uses: Counter[str] = Counter()  # of each ReLU, to name its sites as `activations` does
        self.folded: set[fx.Node] = set()

    def called(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(node.target) if node.op == "call_module" else None

    def write(self, node: fx.Node) -> str:
        """Add what computes a node; returns the name of its output."""
        if node.op == "placeholder":
            return "images"
        inputs = [self.names[each] for each in node.all_input_nodes]
        if node.op == "output" or node in self.folded:
            return inputs[0]
        if node.op == "call_module" and not node.kwargs:
            return self._module(node, self.called(node), inputs[0])
        target = None if node.kwargs else node.target  # what a keyword says would be lost
        if target in (operator.add, operator.iadd, torch.add) and len(inputs) == 2:
            return self._add("Add", inputs, node.name)
        if target is torch.flatten and node.args[1:] == (1,):
            return self._add("Flatten", inputs, node.name, axis=1)
        if (target == "mean" and node.args[1:] == ((2, 3),)) or (
            target is adaptive_avg_pool2d and node.args[1] in (1, (1, 1))
        ):
            axes = self._constant(f"{node.name}.axes", np.array([2, 3]))
            return self._add("ReduceMean", [*inputs, axes], node.name, keepdims=int(target != "mean"))
        given = "".join(f", {key}={value}" for key, value in node.kwargs.items())
        raise KureError(f"'{node}' ({node.target}{given}) cannot be written as ONNX: teach "
                        "kure_lib/quantization/export.py this operation.")  # fmt: skip

    def finished(self, last: fx.Node, image_shape: tuple[int, ...]) -> onnx.ModelProto:
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *image_shape])
        output = helper.make_tensor_value_info(self.names[last], TensorProto.FLOAT, ["N", None])
        graph = helper.make_graph(self.nodes, type(self.model).__name__, [images], [output], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    def _module(self, node: fx.Node, module: nn.Module, x: str) -> str:
        name = node.target
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _pads_with_zeros(module)):
            return self._layer(node, module, x)
        if _is_full_norm(module):
            values = {"weight": module.weight, "bias": module.bias,
                      "mean": module.running_mean, "variance": module.running_var}  # fmt: skip
            inputs = [self._constant(f"{name}.{key}", value) for key, value in values.items()]
            return self._add("BatchNormalization", [x, *inputs], name, epsilon=module.eps)
        if isinstance(module, nn.ReLU | nn.ReLU6):
            return self._relu(name, module, x)
        if isinstance(module, nn.MaxPool2d) and module.dilation == 1 and not module.ceil_mode:
            given = (module.kernel_size, module.stride, module.padding)
            size, stride, pad = (np.broadcast_to(each, 2).tolist() for each in given)
            return self._add("MaxPool", [x], name, kernel_shape=size, strides=stride, pads=pad * 2)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._add("Flatten", [x], name, axis=1)
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            return self._add("GlobalAveragePool", [x], name)
        if isinstance(module, PASSED):
            return x
        raise KureError(f"'{name}' ({module}) cannot be written as ONNX: teach kure_lib/quantization/export.py this "
                        "kind of layer.")  # fmt: skip

    def _layer(self, node: fx.Node, layer: nn.Conv2d | nn.Linear, x: str) -> str:
        name, stored = node.target, self.weights.get(node.target)
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach().cpu()
        factor = torch.ones_like(bias)
        norm = next(iter(node.users))
        module = self.called(norm)
        if len(node.users) == 1 and _is_full_norm(module):
            scale = (module.weight / (module.running_var + module.eps).sqrt()).detach().cpu()
            if stored is None or (scale > 0).all():  # a step is above zero: where a scale is not, the norm stays
                factor = scale
                bias = (bias - module.running_mean.cpu()) * scale + module.bias.detach().cpu()
                self.folded.add(norm)
        inputs = [x, self._weight(name, layer, stored, factor), self._constant(f"{name}.bias", bias)]
        if isinstance(layer, nn.Linear):
            return self._add("Gemm", inputs, name, transB=1)
        return self._add("Conv", inputs, name, strides=layer.stride, pads=layer.padding * 2, dilations=layer.dilation,
                         group=layer.groups)  # fmt: skip

    def _weight(self, name: str, layer: nn.Module, stored: Integers | None, factor: Tensor) -> str:
        if stored is None:
            weight = layer.weight.detach().cpu()
            return self._constant(f"{name}.weight", weight * factor.view(-1, *[1] * (weight.dim() - 1)))
        if stored.offset:
            raise KureError(f"The levels of '{name}' lie {stored.offset:g} steps off the whole numbers: ONNX knows "
                            "integer zero points only, so choose another method than middle.")  # fmt: skip
        kind = TensorProto.INT4 if stored.bits <= 4 else TensorProto.INT8
        scale = stored.step.cpu().flatten() * factor
        inputs = [
            self._constant(f"{name}.codes", stored.codes, kind),
            self._constant(f"{name}.scale", scale),
            self._constant(f"{name}.zero", torch.zeros(len(scale)), kind),
        ]
        return self._add("DequantizeLinear", inputs, f"{name}.weight", axis=0)

    def _relu(self, name: str, module: nn.Module, x: str) -> str:
        site = f"{name}:{self.uses[name]}"
        self.uses[name] += 1
        if isinstance(module, ClippedReLU):  # a Clip has one limit for all channels
            limits = self._constant(f"{site}.limits", module.limits)
            output = self._add("Min", [self._add("Relu", [x], f"{site}.positive"), limits], site)
        elif isinstance(module, nn.ReLU6):
            bounds = [self._constant(f"{site}.{key}", np.float32(value)) for key, value in (("low", 0), ("high", 6))]
            output = self._add("Clip", [x, *bounds], site)
        else:
            output = self._add("Relu", [x], site)
        if site not in self.steps:
            return output
        grid = [self._constant(f"{site}.scale", self.steps[site]),
                self._constant(f"{site}.zero", np.uint8(0), TensorProto.UINT8)]  # fmt: skip
        codes = self._add("QuantizeLinear", [output, *grid], f"{site}.codes")
        return self._add("DequantizeLinear", [codes, *grid], f"{site}.values")

    def _constant(self, name: str, value: Any, kind: int | None = None) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if kind is not None:
            array = array.astype(helper.tensor_dtype_to_np_dtype(kind))
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def _add(self, operation: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operation, inputs, [f"{name}.output"], name, **attributes))
        return f"{name}.output"
