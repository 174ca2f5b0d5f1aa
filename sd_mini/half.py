"""Gradients through a network in float16, which loses digits below 6e-5 and holds none below 6e-8.

The gradient of a mean over 16,384 coordinates lies there. So it is enlarged where it enters the
network, at its output, and made small again where it leaves, at its input. With float16 weights
that are not trained no other gradient is wanted.
"""
import torch


class Enlarge(torch.autograd.Function):
    """The same forward. Backward: times a power of two that makes each row's largest about 1."""

    @staticmethod
    def forward(ctx, out, scale):
        ctx.scale = scale
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        largest = grad.abs().flatten(1).amax(1).clamp(min=1e-30)
        ctx.scale[:] = [torch.exp2(-largest.log2().round())]  # on the device: nobody waits for it
        return grad * ctx.scale[0].view(-1, *[1] * (grad.dim() - 1)), None


class Reduce(torch.autograd.Function):
    """The same forward, in float16. Backward: in float32, divided by what `Enlarge` multiplied."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.half()

    @staticmethod
    def backward(ctx, grad):
        return grad.float() / ctx.scale[0].view(-1, *[1] * (grad.dim() - 1)), None


def scaled_gradients(dtype):
    """-> (enter, leave), to be put around a network of that dtype; at other dtypes a plain cast."""
    if dtype != torch.float16:
        return lambda x: x.to(dtype), lambda out: out
    scale = []
    return (lambda x: Reduce.apply(x, scale)), (lambda out: Enlarge.apply(out, scale))
