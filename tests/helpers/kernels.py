"""What a training step must not ask of a GPU, checked on the CPU."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class NoSyncNoAtomics(TorchDispatchMode):
    """Fails on operators that wait for a device, or whose sums depend on its scheduling."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal",
                 "index_put", "_index_put_impl", "index_add", "scatter_add",
                 "embedding_dense_backward")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name.rstrip("_") not in self.FORBIDDEN, name
        return func(*args, **(kwargs or {}))
