"""Stand-in for SGLang's compiled kernels, for CPU environments only.

SGLang 0.5.17 imports names from `sgl_kernel` at module level and, when it serves a plain model on a CPU, calls none of them. The real
wheel needs CUDA. Every name exists here; calling one fails and says which.
"""


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} was called, but this CPU environment has only the stand-in of sgl_kernel")

    missing.__name__ = name
    return missing
