"""What the device of a tensor can do."""

import torch


def compute_capability(tensor: torch.Tensor) -> int:
    """Major compute capability, 9 for Hopper; 0 on a CPU, where Triton's interpreter runs the kernels."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 0
