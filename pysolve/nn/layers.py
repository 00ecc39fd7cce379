"""Drop-in layers whose weight is a sparse matrix: for inference, and for fine-tuning what is left of it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, unfold

from pysolve.errors import PysolveError
from pysolve.forms import Sparse
from pysolve.sparse import Layout, SparseMatrix


class _Product(torch.autograd.Function):
    """Y = X Aᵀ + b or A X + b for a layer's matrix A, whose gradient goes to X, A's entries and b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: _Sparse, layout: Layout
    ) -> Tensor:
        # The values only so that changing them before the backward pass is an error, as elsewhere in torch.
        ctx.save_for_backward(x, values)
        ctx.layer, ctx.layout = layer, layout
        return layer.product(x, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, _), layer, layout = ctx.saved_tensors, ctx.layer, ctx.layout
        matrix, g = layer.matrix(), gradient.numpy()
        by_x = by_values = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = torch.from_numpy(layer.flipped().matmul(g, layout))
        if ctx.needs_input_grad[1]:
            by_values = torch.from_numpy(matrix.value_gradient(g, x.numpy(), layout))
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum(0 if layout == "batch" else 1)
        return by_x, by_values, by_bias, None, None


class _Sparse(nn.Module):
    """An (h, d) matrix whose entries are a parameter, and a bias.

    The matrix that is multiplied shares its memory with ``values``, so any change to them counts. A state
    dict of another number of entries may be loaded.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    indptr: Tensor
    indices: Tensor

    def __init__(self, matrix: csr_array, bias: Tensor | None) -> None:
        super().__init__()
        self.shape: tuple[int, int] = matrix.shape
        self._matrix: SparseMatrix | None = None
        self._flipped: tuple[SparseMatrix, Any] | None = None
        prepared = SparseMatrix.from_csr(matrix)
        clean = prepared.to_csr()
        self.values = nn.Parameter(torch.from_numpy(clean.data))
        self.register_buffer("indptr", torch.from_numpy(clean.indptr.astype(np.int64)))
        self.register_buffer("indices", torch.from_numpy(clean.indices.astype(np.int32)))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def density(self) -> float:
        """Share of the places that have an entry."""
        return self.values.numel() / max(1, self.shape[0] * self.shape[1])

    def matrix(self) -> SparseMatrix:
        """The prepared matrix; from then on ``values`` lies in its memory."""
        values = self.values
        if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
            raise PysolveError(
                "a sparse layer runs on the CPU in float32 or float64, got "
                f"{values.dtype} on {values.device}: move it there, or take to_dense()."
            )
        if self._matrix is None or self._matrix.values.ctypes.data != values.data_ptr() or not values.numel():
            csr = (values.detach().numpy(), self.indices.numpy(), self.indptr.numpy())
            self._matrix = SparseMatrix.from_csr(csr_array(csr, shape=self.shape))
            if self._matrix.nnz != values.numel():
                raise PysolveError("the indices of each row must differ: this layer's state is damaged.")
            self._flipped = None
            values.data = torch.from_numpy(self._matrix.values)
        return self._matrix

    def flipped(self) -> SparseMatrix:
        """The transposed matrix with the values as they are now."""
        matrix = self.matrix()
        if self._flipped is None:
            self._flipped = matrix.transposed()
        flipped, order = self._flipped
        flipped.values[:] = matrix.values[order]
        return flipped

    def product(self, x: Tensor, layout: Layout) -> Tensor:
        """The product and the bias for a matrix of inputs, without gradients."""
        bias = None if self.bias is None else self.bias.detach().numpy()
        return torch.from_numpy(self.matrix().matmul(x.detach().numpy(), layout, bias=bias))

    def multiplied(self, x: Tensor, layout: Layout) -> Tensor:
        """The product and the bias for a matrix of inputs."""
        if x.dtype != self.values.dtype or x.device != self.values.device:
            raise PysolveError(
                f"expected {self.values.dtype} on {self.values.device} as the layer's values are, got "
                f"{x.dtype} on {x.device}."
            )
        if not torch.is_grad_enabled():
            return self.product(x, layout)
        self.matrix()
        result: Tensor = _Product.apply(x, self.values, self.bias, self, layout)  # type: ignore[no-untyped-call]
        return result

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take the sizes of what is loaded, once it is known to be a matrix of this shape."""
        given = {name: state_dict.get(prefix + name) for name in ("values", "indices", "indptr")}
        if all(isinstance(tensor, Tensor) for tensor in given.values()):
            csr = csr_array(tuple(tensor.cpu().numpy() for tensor in given.values()), shape=self.shape)
            prepared = SparseMatrix.from_csr(csr)
            if not np.array_equal(prepared.to_csr().indices, csr.indices):
                raise ValueError(f"{prefix}indices must increase within each row.")
            for name in ("values", "indices"):
                own = getattr(self, name)
                own.data = own.new_empty(given[name].shape)
            self._matrix = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None, "_flipped": None}

    def extra_repr(self) -> str:
        return f"{self.shape[1]} to {self.shape[0]}, density {self.density:.3g}, bias={self.bias is not None}"


class SparseLinear(_Sparse):
    """y = A x + b with a sparse A: takes the place of an ``nn.Linear``.

    Runs on the CPU, in float32 or float64. Gradients go to the inputs, the entries and the bias, so that what
    is left of a pruned layer can be fine-tuned; places without an entry stay zero.

    Parameters
    ----------
    matrix : (h, d) csr_array
    bias : (h,) tensor, optional
    """

    @classmethod
    def from_dense(cls, layer: nn.Linear) -> SparseLinear:
        """A layer with the non-zero weights of a dense one."""
        return cls(csr_array(layer.weight.detach().numpy()), layer.bias).train(layer.training)

    def to_dense(self) -> nn.Linear:
        """The same layer with a dense weight."""
        layer = nn.Linear(self.shape[1], self.shape[0], self.bias is not None, dtype=self.values.dtype)
        _fill(layer, self)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.multiplied(x.reshape(-1, self.shape[1]), "batch").reshape(*x.shape[:-1], self.shape[0])


class SparseConv2d(_Sparse):
    """A 2-d convolution with a sparse weight: takes the place of an ``nn.Conv2d``.

    Of any stride, padding, dilation and groups; its matrix is the unfolded weight, one row an output channel.
    Make one with ``from_dense``. As ``SparseLinear`` otherwise.
    """

    def __init__(self, matrix: csr_array, bias: Tensor | None, dense: nn.Conv2d) -> None:
        super().__init__(matrix, bias)
        self.groups, self.padding_mode = dense.groups, dense.padding_mode
        self.kernel_size: Any = dense.kernel_size
        self.stride: Any = dense.stride
        self.padding: Any = dense.padding
        self.dilation: Any = dense.dilation
        self.margins: list[int] = list(dense._reversed_padding_repeated_twice)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d) -> SparseConv2d:
        """A layer with the non-zero weights of a dense one."""
        weight = layer.weight.detach()
        rows, columns = len(weight) // layer.groups, weight.shape[1]
        whole = weight.new_zeros(len(weight), layer.in_channels, *layer.kernel_size)
        for g in range(layer.groups):
            own = slice(g * rows, (g + 1) * rows)
            whole[own, g * columns : (g + 1) * columns] = weight[own]
        return cls(csr_array(whole.flatten(1).numpy()), layer.bias, layer).train(layer.training)

    def to_dense(self) -> nn.Conv2d:
        """The same layer with a dense weight."""
        channels = self.shape[1] // (self.kernel_size[0] * self.kernel_size[1])
        shape = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        bias = self.bias is not None
        layer = nn.Conv2d(
            channels, len(self.indptr) - 1, *shape, bias, self.padding_mode, dtype=self.values.dtype
        )
        _fill(layer, self)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return self.forward(x[None])[0]
        if any(self.margins):
            x = pad(x, self.margins, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        columns = unfold(x, self.kernel_size, self.dilation, stride=self.stride)
        size = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        together = columns.transpose(0, 1).reshape(self.shape[1], -1)
        return self.multiplied(together, "feature").reshape(self.shape[0], len(x), *size).transpose(0, 1)


def in_form(layer: nn.Module, form: Sparse) -> SparseLinear | SparseConv2d:
    """The sparse layer that takes the place of a dense one, with a weight of the same shape.

    Raises
    ------
    PysolveError
        When the layer is no Linear or Conv2d, or its weight has another shape.
    """
    if type(layer) not in (nn.Linear, nn.Conv2d):
        raise PysolveError(f"only Linear and Conv2d have a sparse form, got {type(layer).__name__}.")
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    if form.shape != tuple(layer.weight.shape):
        raise PysolveError(f"expected a form of shape {tuple(layer.weight.shape)}, got {form.shape}.")
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(torch.from_numpy(form.dense()))
    return SparseLinear.from_dense(dense) if isinstance(dense, nn.Linear) else SparseConv2d.from_dense(dense)


def _fill(dense: nn.Linear | nn.Conv2d, sparse: _Sparse) -> None:
    """Give a dense layer a sparse one's weight, the groups' blocks of its diagonal, and its bias."""
    whole = torch.from_numpy(sparse.matrix().to_csr().toarray())
    groups = getattr(dense, "groups", 1)
    blocks = whole.reshape(groups, len(whole) // groups, groups, -1)
    with torch.no_grad():
        dense.weight.copy_(torch.cat([blocks[g, :, g] for g in range(groups)]).reshape(dense.weight.shape))
        if sparse.bias is not None and dense.bias is not None:
            dense.bias.copy_(sparse.bias)
    dense.train(sparse.training)
