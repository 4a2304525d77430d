"""File formats: one module each. A reader turns headers into `Read` tensors; data is touched only by `load`."""
