"""Names of torch's functions that mean something to whoever records a model."""

# Functions that hand a tensor's values to Python, which may then do anything with them.
READS = frozenset(
    ("__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__",
     "item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr", "__dlpack__", "__format__",
     "__repr__", "storage", "untyped_storage")
)  # fmt: skip
# Functions that no copy could call, with the reason.
REFUSED = {
    "register_hook": "its forward registers a hook on a tensor",
    "backward": "its forward takes gradients of its own",
    "grad": "its forward takes gradients of its own",
}
# Functions that compute nothing.
NO_OPERATION = frozenset(("requires_grad_", "retain_grad", "_assert", "_set_grad_enabled"))
# Functions that tell a size.
SIZES = frozenset(("size", "numel", "nelement"))
# Properties of a tensor that are tensors.
TENSOR_PROPERTIES = frozenset(("T", "mT", "H", "mH", "data", "real", "imag"))
