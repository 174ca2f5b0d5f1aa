"""Gradients through a network in float16, which loses digits below 6e-5 and holds none below 6e-8.

The gradient of a mean over 16,384 coordinates lies there. So it is enlarged where it enters the
network, at its output, and made small again where it leaves, at its input.
"""
import torch


def scaled_gradients(dtype):
    """-> (enter, leave), to be put around a network of that dtype; at other dtypes a plain cast.

    Each row's gradient is enlarged by the power of two that makes its largest value about 1.
    """
    if dtype != torch.float16:
        return lambda x: x.to(dtype), lambda out: out
    scale = []  # of the rows, (B, 1), once the backward has begun

    def enlarge(grad):
        largest = grad.abs().flatten(1).amax(1, keepdim=True).clamp(min=1e-30)
        scale[:] = [torch.exp2(-largest.log2().round())]  # on the device: nobody waits for it
        return (grad.flatten(1) * scale[0]).view_as(grad)

    def reduce(grad):
        return (grad.flatten(1) / scale[0]).view_as(grad)

    def enter(x):
        x = x.float().view_as(x)  # a tensor of its own, whose gradient is in float32
        if x.requires_grad:
            x.register_hook(reduce)
        return x.half()

    def leave(out):
        if out.requires_grad:
            out.register_hook(enlarge)
        return out

    return enter, leave
