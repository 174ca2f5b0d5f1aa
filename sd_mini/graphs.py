"""CUDA graphs: launch the thousands of kernels of a network at once.

At batch 1 a GPU computes a kernel faster than Python launches one. A graph records the kernels of a
forward and of its backward once, for inputs of one shape, and replays them.
"""
import weakref

import torch

ROWS = 2  # larger batches take longer to compute than to launch, and graphs hold on to memory


class Graphs:
    """`sd.run` on a GPU: graphs(network, *tensors) is network(*tensors), replayed where it pays.

    It pays for small batches. Networks in training are called directly, since a graph would compute
    the gradients of their weights in each step of an attack; and so is what autocast casts. The
    first replay is compared with the direct call. If they differ, or nothing can be recorded, all
    is called directly from then on.
    """

    def __init__(self, record=None):
        self.record = record or torch.cuda.make_graphed_callables
        self.replays = weakref.WeakKeyDictionary()  # {network: {shapes: replay}}
        self.waiting = set()  # replays whose backward is still to come, and needs their memory
        self.broken = False

    def __call__(self, network, *inputs):
        if self.broken or len(inputs[0]) > ROWS or torch.is_autocast_enabled():
            return network(*inputs)
        if any(p.requires_grad for p in network.parameters()):
            return network(*inputs)
        grad = torch.is_grad_enabled()
        key = tuple((x.shape, x.dtype, grad and x.requires_grad) for x in inputs)
        replays = self.replays.setdefault(network, {})
        if key not in replays:
            try:
                replays[key] = self.recorded(network, inputs)
            except RuntimeError as error:
                self.broken = True
                self.replays.clear(), self.waiting.clear()  # and their memory
                if inputs[0].is_cuda:  # a recording that failed may leave its own stream behind
                    torch.cuda.set_stream(torch.cuda.default_stream())
                print(f"CUDA graphs: off, since {str(error).splitlines()[0]}")
        if self.broken or replays[key] in self.waiting:
            return network(*inputs)
        out = replays[key](*inputs).clone()  # the next replay writes where this one has
        if out.requires_grad:
            self.waiting.add(replays[key])
            out.register_hook(lambda _: self.waiting.discard(replays[key]))
        return out

    def recorded(self, network, inputs):
        """A function that replays network(*inputs) for other inputs, or RuntimeError."""
        own = weakref.ref(network)  # the graph must not keep a network that is done with
        samples = tuple(torch.zeros_like(x).requires_grad_(x.requires_grad) for x in inputs)
        replay = self.record(lambda *inputs: own()(*inputs), samples)
        answers = []
        for run in (network, replay):
            out = run(*inputs)
            wanted = [x for x in inputs if x.requires_grad] if out.requires_grad else []
            gradients = torch.autograd.grad(out.square().sum(), wanted) if wanted else ()
            answers.append([x.detach().float().clone() for x in (out, *gradients)])
        for direct, replayed in zip(*answers):
            # In bf16 two runs differ by up to 2 %. A replay that has gone wrong differs wholly.
            if not (direct - replayed).norm() <= 0.1 * direct.norm():
                raise RuntimeError("a replay gives other numbers than the network")
        return replay
