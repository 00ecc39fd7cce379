"""A matrix of entries in a layer: its products, their gradients, and what a trace sees of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from pysolve.errors import PysolveError
from pysolve.layer.sparse_matrix import Layout, SparseMatrix


class _Product(torch.autograd.Function):
    """Y = X Aᵀ + b or A X + b for a layer's matrix A, whose gradient goes to X, A's entries and b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: SparseWeight, layout: Layout
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


class SparseWeight(nn.Module):
    """An (h, d) matrix whose entries are a parameter, and a bias.

    The matrix that is multiplied shares its memory with ``values``, so any change to them counts. A state
    dict of another number of entries may be loaded.

    A layer says twice what it does: ``computed`` is what runs; torch.compile leaves it as it is, between two
    graphs. ``traced`` is what torch.export and torch.jit.trace follow: a function of the layer's state in
    torch's own operators, so that what comes of it runs without this package.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    indptr: Tensor
    indices: Tensor

    def __init__(self, matrix: csr_array, bias: Tensor | None, dense: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.shape: tuple[int, int] = matrix.shape
        self.dense_shape: tuple[int, ...] = dense or matrix.shape
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

    @property
    def weight(self) -> Tensor:
        """A tensor without values, for code that asks a layer for the type or the shape of its weight.

        On the meta device it keeps torch's encoder layers from multiplying it themselves.
        """
        return torch.empty(self.dense_shape, dtype=self.values.dtype, device="meta")

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

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self.traced(x)
        return _apart(self, x) if torch.compiler.is_compiling() else self.computed(x)

    def computed(self, x: Tensor) -> Tensor:
        """The layer's output by the sparse product."""
        raise NotImplementedError

    def traced(self, x: Tensor) -> Tensor:
        """The layer's output by the dense weight."""
        raise NotImplementedError

    def scattered(self) -> Tensor:
        """The dense weight; of a matrix of diagonal blocks, as a convolution in groups has, these alone."""
        size, width = math.prod(self.dense_shape), math.prod(self.dense_shape[1:])
        n = self.values.numel()
        # Where the row of each entry begins, by operators whose sizes do not depend on numbers.
        ends = self.indptr[1:-1]
        begins = self.indptr.new_zeros(n + 1).index_add(0, ends, torch.full_like(ends, width)).cumsum(0)[:n]
        places = begins + (self.indices if width == self.shape[1] else self.indices % width)
        return self.values.new_zeros(size).scatter(0, places, self.values).reshape(self.dense_shape)

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
            if not self._within_blocks(csr):
                raise ValueError(f"{prefix}indices must stay within the groups of the convolution.")
            for name in ("values", "indices"):
                own = getattr(self, name)
                own.data = own.new_empty(given[name].shape)
            self._matrix = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _within_blocks(self, csr: csr_array) -> bool:
        """Whether all entries are on the diagonal blocks that the dense weight consists of."""
        h, width = self.shape[0], math.prod(self.dense_shape[1:])
        groups = self.shape[1] // max(1, width)
        block = np.repeat(np.arange(h), np.diff(csr.indptr)) * groups // max(1, h)
        return bool(np.array_equal(block, csr.indices // max(1, width)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrix": None, "_flipped": None}

    def extra_repr(self) -> str:
        return f"{self.shape[1]} to {self.shape[0]}, density {self.density:.3g}, bias={self.bias is not None}"


# What torch.compiler.disable does, which would import torch's compiler, for a second, with this module.
@_disable_dynamo
def _apart(layer: SparseWeight, x: Tensor) -> Tensor:
    return layer.computed(x)
