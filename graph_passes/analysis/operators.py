"""ONNX operators by what they do to the axes of a tensor."""

from __future__ import annotations

#: Each element by itself.
UNARY_OPS = {
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "QuickGelu", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Swish", "Tanh",
}  # fmt: skip
#: Elements at the same place of several operands, which broadcast.
ELEMENTWISE_OPS = {
    "Add", "And", "Div", "Equal", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where",
}  # fmt: skip
NORM_OPS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
#: Elements get another place or are left out; none is changed.
DATA_MOVEMENT_OPS = {
    "Reshape", "Transpose", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast",
}  # fmt: skip
#: Neighbouring pixels of an image.
SPATIAL_OPS = {"Conv", "MaxPool", "AveragePool"}
REDUCTION_OPS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceMax", "ReduceMin", "ReduceProd"}
