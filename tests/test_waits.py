"""What a GPU needs and a CPU can show: no wait for the host, half precision, CUDA graphs.

A tensor of the meta device has no values, so every read of one and every copy to the host fails.
"""
import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import advunlearn as au
from sd_mini import graphs, half, pipeline
from sd_mini.lab import runs
from sd_mini.unet import UNet

from .test_run import PROMPTS, SMALL, erase

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")  # .item(), bool(x), x[mask], ...


class Reads(TorchDispatchMode):
    """Counts reads of values. Adam's do not count: its step number is on the host anyway."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.off = 0, False
        tolist, step = torch.Tensor.tolist, torch.optim.Adam.step

        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        def silent(*arguments):
            self.off = True
            step(*arguments)
            self.off = False

        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        monkeypatch.setattr(torch.optim.Adam, "step", silent)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += function.overloadpacket.__name__ in READS and not self.off
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def without_values(sd):
    """The model and a bank on the meta device."""
    networks = {name: copy.deepcopy(getattr(sd, name)).to("meta")
                for name in ("text_encoder", "unet", "vae")}
    return replace(sd, **networks, schedule=copy.deepcopy(sd.schedule), run=pipeline.call)


@pytest.mark.parametrize("kind", ["embedding", "fast", "token"])
def test_no_step_of_the_inner_attack_reads_a_value(without_values, sd, generator, kind):
    config = replace(SMALL, attack=kind, attack_steps=3)
    attack = au.training_attack(config)
    _, *latents = au.trajectory_bank(sd, PROMPTS[0], config)(2, generator, 1 + attack.steps)
    latents = [au.Latents(*(column.to("meta") for column in z)) for z in latents]
    ids = sd.tokenize(PROMPTS[0]).to("meta")
    delta, loss = au.adversarial_prefix(without_values, ids, latents, attack, generator)
    assert delta.device == loss.device == torch.device("meta")


def test_what_is_drawn_goes_to_the_device_without_a_read(without_values, sd, monkeypatch):
    sampled = au.sample_latents(sd, ["a church"] * 4, range(4), 4).to("meta")
    monkeypatch.setattr(au, "share", lambda *_: [(sampled,)])
    draw = au.trajectory_bank(without_values, ["a church"], replace(SMALL, trajectories=4))
    assert {column.device.type for z in draw(3, torch.Generator(), 2) for column in z} == {"meta"}


@pytest.mark.parametrize("kind", ["token", "longer", "embedding"])
def test_an_evaluation_attack_reads_nothing_before_it_looks(without_values, kind):
    calls = []

    def run(network, *inputs):
        calls.append(network)
        return network(*inputs)

    model = replace(without_values, run=run)
    config = replace(SMALL, eval_prefix=2, eval_attack_steps=7, eval_looks=1)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        au.METHOD.attacks[kind](model, ["a church", "a boat"],
                                torch.rand(2, 3, 64, 64, device="meta"), None, config)
    assert sum(isinstance(network, UNet) for network in calls) == 7


def test_an_iteration_reads_its_losses_at_once_and_an_attack_step_nothing(sd, monkeypatch):
    counts = []
    for steps, attack_steps in ((2, 2), (4, 2), (2, 4)):
        with Reads(monkeypatch) as reads:
            erase(sd, steps=steps, warmup=1, attack_steps=attack_steps)
        counts.append(reads.count)
        monkeypatch.undo()
    assert counts[1] - counts[0] == 2 and counts[2] == counts[0]


# --- half precision

@pytest.fixture
def of_full_size(sd):
    """gradient(dtype, weight) of a prefix: on a quarter of a loss over 4 x 32 x 32 coordinates.

    So each coordinate's is as small as at full size, 4 x 64 x 64.
    """
    ids, draws = sd.tokenize(["a church"]), torch.Generator().manual_seed(1)
    x_t, t = torch.randn(1, 4, 32, 32, generator=draws), torch.tensor([600])
    table = sd.text_encoder.embeddings.token_embedding.weight.detach()
    start = au.random_tokens(sd, (1, 3), draws)
    target = sd.predict_noise(x_t, t, sd.encode_prompt(["a boat"]))

    def gradient(dtype, weight):
        model = replace(sd, unet=copy.deepcopy(sd.unet).to(dtype), precision=dtype)
        delta = table[start].requires_grad_(True)
        loss = au.attack_loss(model, x_t, t, au.encode_with_prefix(model, ids, delta), target)
        return torch.autograd.grad(weight * loss.sum() / 4, delta)[0].flatten() / weight
    return gradient


def test_prefix_gradients_in_float16_are_those_in_float32(of_full_size, monkeypatch):
    """Without scaling those of a small loss are lost: float16 does not hold them."""
    exact = of_full_size(torch.float32, 1)
    for weight in (1, 1e-4):
        scaled = of_full_size(torch.float16, weight)
        assert scaled.dtype == torch.float32
        assert torch.cosine_similarity(exact, scaled, dim=0) >= 0.99
        assert scaled.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)
    monkeypatch.setattr(half, "scaled_gradients", lambda dtype: (
        lambda context: context.to(dtype), lambda out: out))
    assert torch.cosine_similarity(exact, of_full_size(torch.float16, 1e-4), dim=0) < 0.9


def test_rows_are_scaled_each_for_itself():
    """A row whose gradient is a million times smaller keeps all its digits."""
    enter, leave = half.scaled_gradients(torch.float16)
    context = torch.randn(2, 3, 4).requires_grad_(True)
    (leave(enter(context).float()) * torch.tensor([3e-3, 3e-9]).view(2, 1, 1)).sum().backward()
    expected = torch.tensor([3e-3, 3e-9]).view(2, 1, 1).expand(2, 3, 4)
    torch.testing.assert_close(context.grad, expected, rtol=1e-3, atol=0)


def test_a_unet_in_training_computes_in_bfloat16_where_the_model_does(sd, monkeypatch):
    seen = []
    model = replace(sd, precision=torch.bfloat16, run=lambda network, x_t, t, context: seen.append(
        torch.is_autocast_enabled("cpu")) or network(x_t, t, context))
    arguments = torch.randn(1, *sd.latent_shape), 500, sd.encode_prompt(["a church"])
    mixed, exact = model.predict_noise(*arguments), sd.predict_noise(*arguments)
    assert seen == [True] and mixed.dtype == torch.float32
    assert 1e-4 < (mixed - exact).norm() / exact.norm() < 0.05


# --- CUDA graphs, with a recorder that has their traps: fixed shapes, and memory used again

class Recorder:
    """Stands in for torch.cuda.make_graphed_callables."""

    def __init__(self, wrong=0.0):
        self.recorded, self.replayed, self.wrong = 0, 0, wrong

    def __call__(self, function, samples):
        self.recorded += 1
        recorder, held = self, [x.detach().clone() for x in samples]
        out = function(*samples).detach()

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                for own, x in zip(held, inputs):
                    assert own.shape == x.shape and own.dtype == x.dtype
                    own.copy_(x)
                out.copy_(function(*held).detach() + recorder.wrong)
                return out.view_as(out)

            @staticmethod
            def backward(ctx, grad):  # of the inputs that were last put in
                leaves = [x.clone().requires_grad_(s.requires_grad) for x, s in zip(held, samples)]
                with torch.enable_grad():
                    answer = function(*leaves)
                wanted = [x for x in leaves if x.requires_grad]
                grads = iter(torch.autograd.grad(answer, wanted, grad))
                return tuple(next(grads) if x.requires_grad else None for x in leaves)

        def replay(*inputs):
            recorder.replayed += 1
            return Replay.apply(*inputs)
        return replay


class Frozen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)

    def forward(self, x):
        return (x @ self.weight).tanh()


def test_replays_give_the_networks_numbers_and_gradients():
    """... also where two outputs wait for one backward, where outputs are kept, for each shape."""
    recorder, network = Recorder(), Frozen()
    run = graphs.Graphs(recorder)
    a, b = (torch.randn(2, 4, requires_grad=True) for _ in range(2))
    loss = lambda call: (call(network, a).square().sum() + 3 * call(network, b).sum())  # noqa: E731
    for _ in range(3):
        found, expected = (torch.autograd.grad(loss(call), (a, b)) for call in (run, pipeline.call))
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        first, second = run(network, a), run(network, b)
        torch.testing.assert_close((first, second), (network(a), network(b)))
        torch.testing.assert_close(run(network, a[:1]), network(a[:1]))
    assert recorder.recorded == 3 and recorder.replayed >= 3 + 3 + 3


def test_graphs_leave_large_batches_and_networks_in_training_alone():
    recorder, network = Recorder(), Frozen()
    run = graphs.Graphs(recorder)
    run(network, torch.randn(graphs.ROWS + 1, 4))
    run(network.requires_grad_(True), torch.randn(1, 4))
    assert recorder.recorded == 0
    run(network.requires_grad_(False), torch.randn(1, 4))
    run(network, torch.randn(1, 4))
    assert recorder.recorded == 1


@pytest.mark.parametrize("fault", [1.0, float("nan"), "stale", "cannot record"])
def test_graphs_that_fail_are_left_out_with_a_word(fault, capsys):
    def refuse(*arguments):
        raise RuntimeError("no such driver\nmore")

    def stale(function, samples):
        out = function(*samples).detach()
        return lambda *inputs: out

    records = {"stale": stale, "cannot record": refuse}
    run, network = graphs.Graphs(records.get(fault) or Recorder(fault)), Frozen()
    x = torch.randn(1, 4)
    for _ in range(2):
        assert torch.equal(run(network, x), network(x))
    said = capsys.readouterr().out
    assert said.count("CUDA graphs: off") == 1 and said.count("\n") == 1


def test_the_bank_is_on_the_gpu_where_it_fits(monkeypatch):
    class Column:
        nbytes = 100

        def to(self, device):
            return device

    columns, gpu = [Column(), Column()], torch.device("cuda")
    for free, expected in ((400, [gpu, gpu]), (399, columns)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
        assert runs.placed(iter(columns), gpu) == expected
