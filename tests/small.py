"""Tiny networks, one for each hazard of finding and removing channels, each with one batch of inputs."""

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Layers by name, and a function of the network and its input."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


class Noisy(nn.Module):
    """Random even in evaluation mode, as the decoder of a variational autoencoder is fed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x):
        mean = self.b(F.relu(self.a(x)))
        return self.c(mean + torch.randn_like(mean))


class Keywords(nn.Module):
    """Called by keywords, returns a structure."""

    def __init__(self):
        super().__init__()
        self.words, self.fc1, self.fc2 = nn.Embedding(11, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, ids, mask=None):
        hidden = self.words(ids) * mask[..., None]
        return {"scores": (self.fc2(F.gelu(self.fc1(hidden))), None), "words": ids}


def images(channels=3, size=8, n=2):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class Turned(nn.Module):
    """A linear layer whose weight is (inputs, outputs), as Conv1D of transformers."""

    def __init__(self, d, h):
        super().__init__()
        self.nf, self.nx = h, d
        self.weight, self.bias = nn.Parameter(vectors(d, h)), nn.Parameter(vectors(h))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


def classifier(net, x):
    return net.fc(x.mean((2, 3)))


def residual():
    def run(net, x):
        x = F.relu(net.bn(net.stem(x)))
        return classifier(net, F.relu(x + net.conv2(F.relu(net.conv1(x)))))

    conv1, conv2 = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
    stem = nn.Conv2d(3, 6, 3, padding=1)
    return Net(run, stem=stem, bn=nn.BatchNorm2d(6), conv1=conv1, conv2=conv2, fc=nn.Linear(6, 4)), images()


def two_residuals():
    def run(net, x):
        x = net.stem(x)
        x = x + net.b1(F.relu(net.a1(x)))
        x = x + net.b2(F.relu(net.a2(x)))
        return net.fc(x)

    def branch(inner):
        return nn.Linear(6, inner), nn.Linear(inner, 6)

    (a1, b1), (a2, b2) = branch(5), branch(7)
    stem, fc = nn.Linear(4, 6), nn.Linear(6, 3)
    return Net(run, stem=stem, a1=a1, b1=b1, a2=a2, b2=b2, fc=fc), vectors(4, 4)


def projection_shortcut():
    def run(net, x):
        x = F.relu(net.stem(x))
        return classifier(net, F.relu(net.bn(net.conv(x)) + net.shortcut(x)))

    conv, shortcut = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1, stride=2)
    bn, fc = nn.BatchNorm2d(6), nn.Linear(6, 3)
    return Net(run, stem=nn.Conv2d(3, 4, 3), conv=conv, bn=bn, shortcut=shortcut, fc=fc), images()


def _padded_shortcut(shortcut):
    def run(net, x):
        x = F.relu(net.stem(x))
        return classifier(net, F.relu(net.conv2(F.relu(net.conv1(x))) + net.shortcut(x)))

    conv1, conv2 = nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.Conv2d(5, 8, 3, padding=1)
    stem, fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 3)
    return Net(run, stem=stem, conv1=conv1, conv2=conv2, shortcut=shortcut, fc=fc), images()


def padded_shortcut_in_code():
    return _padded_shortcut(Net(lambda net, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))))


def padded_shortcut_by_a_layer():
    pad = nn.ZeroPad3d((0, 0, 0, 0, 1, 3))
    return _padded_shortcut(Net(lambda net, x: net.pad(x[:, :, ::2, ::2]), pad=pad))


def depthwise():
    wide = nn.Conv2d(6, 6, 3, groups=6, padding=1)
    layers = (nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), wide, nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1))
    return nn.Sequential(*layers), images()


def depth_multiplier():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)), images()


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)
    ), images()


def depthwise_on_the_input():
    return nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 5, 1), nn.Conv2d(5, 2, 1)), images()


def transposed():
    up = nn.ConvTranspose2d(5, 6, 2, stride=2)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), up, nn.ReLU(), nn.Conv2d(6, 2, 3)), images()


def dilated():
    return nn.Sequential(nn.Conv2d(3, 5, 3, dilation=2), nn.SiLU(), nn.Conv2d(5, 2, 3, dilation=2)), images(
        size=12
    )


def concat():
    def run(net, x):
        both = torch.cat([F.relu(net.a(x)), x, net.b(x)], 1)
        return net.c(both)

    return Net(run, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 5, 1), c=nn.Conv2d(12, 2, 1)), images()


def sliced():
    """Pieces of different widths, written into the code."""

    def run(net, x):
        first, second = net.a(x).split([3, 5], 1)
        return net.b(first) + net.c(F.relu(second))

    return Net(run, a=nn.Linear(4, 8), b=nn.Linear(3, 2), c=nn.Linear(5, 2)), vectors(4, 4)


def chunked_swiglu():
    def run(net, x):
        gate, up = net.a(x).chunk(2, -1)
        return net.b(F.silu(gate) * up)

    return Net(run, a=nn.Linear(4, 14, bias=False), b=nn.Linear(7, 4, bias=False)), vectors(4, 4)


def swiglu():
    def run(net, x):
        return net.down(F.silu(net.gate(x)) * net.up(x))

    gate, up, down = nn.Linear(4, 7, bias=False), nn.Linear(4, 7, bias=False), nn.Linear(7, 4, bias=False)
    return Net(run, gate=gate, up=up, down=down), vectors(4, 4)


def flattened_by_view():
    def run(net, x):
        x = F.max_pool2d(F.relu(net.conv(x)), 2)
        return net.fc(x.view(x.size(0), -1))

    return Net(run, conv=nn.Conv2d(3, 5, 3, padding=1), fc=nn.Linear(5 * 16, 3)), images()


def adaptive_pool():
    layers = (nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 3))
    return nn.Sequential(*layers), images()


def upsampled():
    layers = (nn.Conv2d(3, 5, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(5, 2, 3))
    return nn.Sequential(*layers), images()


def shared_layer():
    def run(net, x):
        return net.out(F.relu(net.twice(F.relu(net.twice(net.stem(x))))))

    return Net(run, stem=nn.Linear(4, 6), twice=nn.Linear(6, 6), out=nn.Linear(6, 2)), vectors(4, 4)


def unused_layer():
    return Net(
        lambda net, x: net.b(F.relu(net.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2), c=nn.Linear(6, 6)
    ), vectors(4, 4)


def single_channel():
    return nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 2, 3)), images()


def norm_without_affine():
    layers = (nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False), nn.ReLU(), nn.Conv2d(5, 2, 3))
    return nn.Sequential(*layers), images()


def instance_norm():
    layers = (nn.Conv2d(3, 5, 3), nn.InstanceNorm2d(5), nn.PReLU(5), nn.Conv2d(5, 2, 3))
    return nn.Sequential(*layers), images()


def group_norm():
    layers = (nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    return nn.Sequential(*layers), images()


def one_group_norm():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.Conv2d(6, 2, 3)), images()


def squeeze_and_excite():
    def run(net, x):
        x = net.conv(x)
        gate = net.up(F.relu(net.down(x.mean((2, 3)))))
        return net.out(x * torch.sigmoid(gate)[:, :, None, None])

    conv, out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)
    return Net(run, conv=conv, down=nn.Linear(8, 4), up=nn.Linear(4, 8), out=out), images()


def attention(width=12, heads=3, written=False, kv_heads=None, rotary=False, dot=False):
    """Self-attention by hand; ``written``: the number of heads stands in the code."""
    kv_heads = kv_heads or heads
    d = width // heads

    def split(values):
        b, t, _ = values.shape
        return values.view(b, t, *((heads, -1) if written else (-1, d))).transpose(1, 2)

    def turned(values):
        if not rotary:
            return values
        angles = torch.arange(values.shape[2])[:, None] * torch.ones(d)
        half = torch.cat([-values[..., d // 2 :], values[..., : d // 2]], -1)
        return values * angles.cos() + half * angles.sin()

    def run(net, x):
        b, t, _ = x.shape
        q, k, v = turned(split(net.q(x))), turned(split(net.k(x))), split(net.v(x))
        if kv_heads < heads:
            k, v = (one.repeat_interleave(heads // kv_heads, 1) for one in (k, v))
        if dot:
            scores = (q @ k.transpose(-1, -2) / d**0.5).softmax(-1)
            y = scores @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return net.o(y.transpose(1, 2).reshape(b, t, -1))

    q, k, v = (nn.Linear(5, n * d) for n in (heads, kv_heads, kv_heads))
    return Net(run, q=q, k=k, v=v, o=nn.Linear(width, 4)), vectors(2, 6, 5)


def hard_coded_attention():
    return attention(written=True)


def attention_by_products():
    return attention(dot=True)


def grouped_queries():
    return attention(width=16, heads=4, kv_heads=2, rotary=True)


def shuffled_by_views():
    """As in ShuffleNet: one half passes a branch, then the halves are shuffled; all widths are read."""

    def shuffled(x, groups):
        b, c, h, w = x.size()
        return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, -1, h, w)

    def run(net, x):
        kept, worked = net.stem(x).chunk(2, 1)
        kept, worked = shuffled(torch.cat([kept, F.relu(net.branch(worked))], 1), 2).chunk(2, 1)
        return net.out(shuffled(torch.cat([kept, F.relu(net.second(worked))], 1), 2))

    branch, second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
    return Net(run, stem=nn.Conv2d(3, 16, 1), branch=branch, second=second, out=nn.Conv2d(16, 2, 1)), images()


def interleaved_by_views():
    """Neighbours are swapped, so that they must go together."""

    def run(net, x):
        b, c, h, w = net.a(x).shape
        return net.b(net.a(x).view(b, c // 2, 2, h, w).flip(2).reshape(b, c, h, w))

    return Net(run, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)), images()


def counted_heads():
    """Heads and their channels are integers that the code reads; the others only look like them."""

    def run(net, x):
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, net.heads, -1).transpose(1, 2) for layer in (net.q, net.k, net.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, net.width)
        return net.o(y)[:, : net.last]

    layers = {name: nn.Linear(5, 12) for name in "qkv"}
    model = Net(run, o=nn.Linear(12, 4), **layers)
    model.heads, model.width, model.last, model.unread = 3, 12, 3, 3
    return nn.Sequential(nn.Linear(4, 5), model), vectors(2, 6, 4)


def one_key_head():
    """All queries share a key and a value, which torch broadcasts."""

    def run(net, x):
        q, k, v = net.q(x).unflatten(-1, (-1, 4)).transpose(1, 2), net.k(x)[:, None], net.v(x)[:, None]
        return net.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    q, k, v, o = nn.Linear(5, 12), nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(12, 3)
    return Net(run, q=q, k=k, v=v, o=o), vectors(2, 6, 5)


def multihead_attention():
    def run(net, x):
        x = net.stem(x)
        return net.fc2(F.relu(net.fc1(net.attention(x, x, x)[0])))

    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    return Net(
        run, stem=nn.Linear(4, 6), attention=attention, fc1=nn.Linear(6, 7), fc2=nn.Linear(7, 3)
    ), vectors(2, 5, 4)


def transformer_layer():
    return nn.TransformerEncoderLayer(6, 2, 7, batch_first=True), vectors(2, 5, 6)


def _normed_stream(norm):
    def run(net, x):
        x = net.stem(x)
        x = x + net.fc2(F.gelu(net.fc1(net.norm(x))))
        return net.out(x)

    fc1, fc2, out = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 3)
    return Net(run, stem=nn.Linear(4, 6), norm=norm, fc1=fc1, fc2=fc2, out=out), vectors(2, 5, 4)


def layer_norm_stream():
    return _normed_stream(nn.LayerNorm(6))


def rms_norm_stream():
    return _normed_stream(nn.RMSNorm(6))


def handmade_norm_stream():
    def run(net, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * net.weight

    return _normed_stream(Net(run, weight=nn.Parameter(torch.ones(6))))


def offset_norm_stream():
    def run(net, x):
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + net.epsilon)
        return (scaled * (1.0 + net.weight.float())).type_as(x)

    norm = Net(run, weight=nn.Parameter(torch.zeros(6)))
    norm.epsilon = 1e-3
    return _normed_stream(norm)


def hard_coded_reshape():
    def run(net, x):
        return net.b(net.a(x).view(-1, 2, 4).flatten(1))

    return Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 2)), vectors(4, 4)


def conv1d():
    return nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU(), nn.Conv1d(5, 2, 3)), vectors(
        2, 3, 9
    )


def conv3d():
    layers = (nn.Conv3d(2, 5, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(5 * 8, 3))
    return nn.Sequential(*layers), vectors(2, 2, 5, 5, 5)


def embedding_stream():
    def run(net, ids):
        x = net.words(ids) + net.places(torch.arange(ids.shape[1]))
        x = x + net.fc2(F.gelu(net.fc1(x)))
        return net.out(x)

    words, places = nn.Embedding(11, 6), nn.Embedding(5, 6)
    ids = torch.arange(10).view(2, 5)
    return Net(
        run, words=words, places=places, fc1=nn.Linear(6, 7), fc2=nn.Linear(7, 6), out=nn.Linear(6, 3)
    ), ids


def noisy():
    return Noisy(), vectors(4, 4)


def keywords():
    return Keywords(), {"ids": torch.arange(10).view(2, 5), "mask": torch.ones(2, 5)}


def input_shortcut():
    def run(net, x):
        return net.fc(F.relu(net.stem(x) + x))

    return Net(run, stem=nn.Linear(4, 4), fc=nn.Linear(4, 2)), vectors(4, 4)


def scaled_by_a_parameter():
    def run(net, x):
        return net.fc(net.stem(x) * net.scale)

    return Net(run, stem=nn.Linear(4, 6), scale=nn.Parameter(torch.rand(6)), fc=nn.Linear(6, 2)), vectors(
        4, 4
    )


def weighted_features():
    """Learned scalars weigh two branches, learned vectors are added and multiplied, a buffer masks."""

    def run(net, x):
        weights = F.relu(net.weights)
        weights = weights / weights.sum()
        x = F.relu(net.a(x)) * net.mask[None, :, None, None]
        x = weights[0] * x + weights[1] * net.b(x)
        return net.out(net.scales[0] * net.c(x) + net.scales[1])

    return Net(
        run,
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(6, 6, 1),
        c=nn.Conv2d(6, 7, 1),
        out=nn.Conv2d(7, 2, 1),
        weights=nn.Parameter(torch.tensor([0.4, 0.6])),
        scales=nn.ParameterList([torch.rand(1, 7, 1, 1) + 0.5, torch.rand(7, 1, 1)]),
        mask=nn.Buffer((torch.arange(6) % 3 > 0).float(), persistent=False),
    ), images()


def handmade_batch_norms():
    """Statistics as buffers of modules of the network's own: in a formula, and by torch's function."""

    def formula(net, x):
        scale = net.gain * (net.var + 1e-5).rsqrt()
        return x * scale.reshape(1, -1, 1, 1) + (net.shift - net.mean * scale).reshape(1, -1, 1, 1)

    def function(net, x):
        return F.batch_norm(x, net.mean, net.var, net.gain, net.shift)

    def norm(run, n):
        gain, shift = nn.Parameter(torch.rand(n) + 0.5), nn.Parameter(torch.rand(n))
        return Net(
            run, gain=gain, shift=shift, mean=nn.Buffer(torch.rand(n)), var=nn.Buffer(torch.rand(n) + 0.5)
        )

    layers = nn.Conv2d(3, 6, 3), norm(formula, 6), nn.ReLU(), nn.Conv2d(6, 5, 1), norm(function, 5), nn.ReLU()
    return nn.Sequential(*layers, nn.Conv2d(5, 2, 1)), images()


def learned_positions():
    """A parameter of all positions and channels, and one of heads."""

    def run(net, x):
        x = net.stem(x) + net.places
        queries, keys, values = (layer(x).unflatten(-1, (-1, 4)) for layer in (net.q, net.k, net.v))
        scores = torch.einsum("nthd,nshd->nhts", queries, keys) * net.sharpness
        return net.o(torch.einsum("nhts,nshd->nthd", scores.softmax(-1), values).flatten(2))

    layers = {name: nn.Linear(6, 12) for name in "qkv"}
    sharpness = nn.Parameter(torch.rand(3, 1, 1))
    places, stem = nn.Parameter(torch.rand(1, 5, 6)), nn.Linear(4, 6)
    return Net(run, stem=stem, places=places, sharpness=sharpness, o=nn.Linear(12, 4), **layers), vectors(
        2, 5, 4
    )


def class_token():
    """A learned token before the others, and positions for all of them."""

    def run(net, x):
        x = torch.cat([net.token.expand(len(x), -1, -1), net.stem(x)], 1) + net.places
        return net.out(F.relu(net.fc(x))[:, 0])

    token, places = nn.Parameter(torch.rand(1, 1, 6)), nn.Parameter(torch.rand(1, 5, 6))
    stem, fc, out = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 2)
    return Net(run, stem=stem, token=token, places=places, fc=fc, out=out), vectors(2, 4, 4)


def added_parameter_is_summed():
    def run(net, x):
        return net.fc((net.stem(x) + net.shift) * net.shift.sum())

    shift = nn.Parameter(torch.rand(6))
    return Net(run, stem=nn.Linear(4, 6), shift=shift, fc=nn.Linear(6, 2)), vectors(4, 4)


def unknown_operator():
    strange = Net(lambda net, x: x.renorm(2, 1, 1e3))
    layers = (nn.Conv2d(3, 8, 1), strange, nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    return nn.Sequential(*layers), images()


def shuffled_pixels():
    """Four channels become one twice as large, and each channel of the input four."""

    def run(net, x):
        return net.out(net.up(net.inner(net.up(net.stem(net.down(x))))))

    stem, inner, out = nn.Conv2d(12, 8, 1), nn.Conv2d(2, 12, 3), nn.Conv2d(3, 2, 1)
    return Net(
        run, down=nn.PixelUnshuffle(2), stem=stem, up=nn.PixelShuffle(2), inner=inner, out=out
    ), images()


def vectors_to_images():
    """A Linear makes images for a norm and convolutions, one of which reads two glued together."""

    def run(net, x):
        x = F.relu(net.norm(net.fc(x).view(len(x), -1, 2, 2)))
        return net.out(torch.cat([net.up(x), net.side(x)], 2))

    layers = {"up": nn.ConvTranspose2d(5, 4, 2, 2), "side": nn.ConvTranspose2d(5, 4, 2, 2)}
    return Net(run, fc=nn.Linear(6, 20), norm=nn.BatchNorm2d(5), **layers, out=nn.Conv2d(4, 2, 1)), vectors(
        3, 6
    )


def unflattened():
    convolutions = nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 2, 1)
    return nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (4, 2, 2)), nn.ReLU(), *convolutions), vectors(
        3, 4
    )


def unshuffled_pixels():
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PixelUnshuffle(2), nn.Conv2d(16, 2, 1)
    return nn.Sequential(*layers), images()


def shuffled_channels():
    layers = nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    return nn.Sequential(*layers), images()


def computed_weight():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return Net(
        lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))), a=layer, b=nn.Linear(6, 5), c=nn.Linear(5, 2)
    ), vectors(4, 4)


def tied_weights():
    def run(net, x):
        return net.c(F.relu(net.b(F.relu(net.a(x)))))

    a, b, c = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)
    c.weight = a.weight
    return Net(run, a=a, b=b, c=c), vectors(4, 4)


def borrowed_weight():
    def run(net, x):
        return net.b(F.relu(net.a(x))) + net.a.weight.sum()

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 2)), vectors(4, 4)


def autocast():
    def run(net, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = F.relu(net.a(x))
        with torch.no_grad():
            return net.b(hidden.float())

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 2)), vectors(4, 4)


def dead_end():
    def run(net, x):
        net.unread(x)
        return net.b(F.relu(net.a(x)))

    return Net(run, unread=nn.Linear(4, 5), a=nn.Linear(4, 6), b=nn.Linear(6, 2)), vectors(4, 4)


def in_place():
    def run(net, x):
        x = net.a(x)
        x += 1
        F.relu_(x)
        x.mul_(net.b(x))
        return net.c(x)

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2)), vectors(4, 4)


def softmax_between():
    return nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2)), vectors(4, 4)


def pooled_by_scores():
    """Attention pooling: one score for each position, by a layer and by a parameter."""

    def run(net, x):
        score = net.score(net.key(x).tanh()).softmax(1) + (net.key(x) @ net.query).softmax(1)
        return net.out((score * net.value(x)).sum(1))

    layers = {"key": nn.Linear(4, 6), "score": nn.Linear(6, 1), "value": nn.Linear(4, 5)}
    return Net(run, **layers, query=nn.Parameter(torch.randn(6, 1)), out=nn.Linear(5, 2)), vectors(4, 3, 4)


def matrices_of_parameters():
    """Products with parameters in several forms, as in code that has no layers."""

    def run(net, x):
        x = torch.addmm(net.bias, F.linear((x @ net.a).relu(), net.b).tanh(), net.c)
        return net.out(x.relu())

    shapes = {"a": (4, 6), "b": (5, 6), "bias": (7,), "c": (5, 7)}
    values = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return Net(run, **values, out=nn.Linear(7, 2)), vectors(4, 4)


class Adapted(nn.Linear):
    """A linear layer with parameters of its own beside the weight, as adapters have."""

    def __init__(self, d, h, rank=3):
        super().__init__(d, h)
        self.down, self.up = nn.Parameter(torch.randn(rank, d)), nn.Parameter(torch.randn(h, rank))
        self.gain = nn.Parameter(torch.rand(h) + 0.5)

    def forward(self, x):
        return self.gain * (super().forward(x) + x @ self.down.T @ self.up.T / 2)


def parameters_of_a_layers_own():
    return nn.Sequential(nn.Linear(3, 4), Adapted(4, 6), nn.ReLU(), nn.Linear(6, 2)), vectors(4, 3)


def unread_sum():
    """The last block's sum is left, as in WaveNet, but its sizes must fit."""

    def run(net, x):
        x = net.stem(x)
        hidden = net.a(x).tanh()
        x = x + net.residual(hidden)
        return net.out(hidden)

    layers = {"stem": nn.Linear(4, 6), "a": nn.Linear(6, 5), "residual": nn.Linear(5, 6)}
    return Net(run, **layers, out=nn.Linear(5, 2)), vectors(3, 4)


def added_to_zeros():
    """Rows gathered and added up by number in sums that begin as zeros, as messages on a graph of loops."""

    def run(net, x):
        x = net.a(x)
        source = torch.arange(len(x))
        goal, rows = source, x[source]
        sums = x.new_zeros(x.shape).index_add(0, goal, rows)
        largest = torch.zeros(len(x), x.shape[1]).scatter_reduce(
            0, goal[:, None].expand(-1, x.shape[1]), rows, "amax", include_self=False
        )
        return net.b(sums + largest)

    return Net(run, a=nn.Linear(4, 6), b=nn.Linear(6, 2)), vectors(3, 4)


def state_from_zeros():
    """A recurrent layer by hand."""

    def run(net, x):
        state = torch.zeros(len(x), net.again.in_features)
        for t in range(x.shape[1]):
            state = 0.5 * state + (net.a(x[:, t]) + net.again(state)).tanh()
        return net.out(state)

    layers = {"a": nn.Linear(4, 6), "again": nn.Linear(6, 6), "out": nn.Linear(6, 2)}
    return Net(run, **layers), vectors(3, 5, 4)


def windows_of_images():
    """Patches as columns."""

    def run(net, x):
        return net.fc(F.unfold(net.conv(x).relu(), (3, 2), padding=1).mT)

    return Net(run, conv=nn.Conv2d(3, 5, 3), fc=nn.Linear(30, 2)), images()


def filtered_images():
    """Each channel is blurred by a buffer for all, and by one that is the same for all."""

    def run(net, x):
        x = F.conv2d(net.a(x).relu(), net.blur, net.shift, stride=2, groups=net.blur.shape[0])
        x = F.conv_transpose2d(x, net.one.expand(x.shape[1], -1, -1, -1), stride=2, groups=x.shape[1])
        return net.b(x)

    model = Net(run, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 2, 1), shift=nn.Parameter(vectors(6)))
    model.register_buffer("blur", torch.rand(6, 1, 3, 3))
    model.register_buffer("one", torch.rand(1, 1, 2, 2))
    return model, images()


class ChannelsFirst(nn.LayerNorm):
    """As in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def channels_first_norm():
    layers = nn.Conv2d(3, 6, 3), ChannelsFirst(6), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)
    return nn.Sequential(*layers), images()


def size_of_another():
    """As in SegFormer: a view of one layer's channels counts those of another's input."""

    def run(net, x):
        x = net.a(x)
        y = net.norm(net.b(x).reshape(len(x), x.shape[1], -1).mT)
        return net.d(y.mean(1)) + net.c(x).mean((2, 3))

    layers = {"a": nn.Conv2d(3, 8, 1), "b": nn.Conv2d(8, 8, 2, stride=2), "c": nn.Conv2d(8, 2, 1)}
    return Net(run, **layers, norm=nn.LayerNorm(8), d=nn.Linear(8, 2)), images()


def single_head():
    def run(net, x):
        return net.o((net.q(x) @ net.k(x).mT).softmax(-1) @ net.v(x))

    layers = {name: nn.Linear(4, 6) for name in "qkv"}
    return Net(run, **layers, o=nn.Linear(6, 4)), vectors(2, 5, 4)


def gated_images():
    """As in an attention U-Net: one gate for all channels of a pixel."""

    def run(net, x):
        gate = net.psi(F.relu(net.a(x) + net.b(x))).sigmoid()
        return net.out(F.relu(net.value(x)) * gate)

    layers = {"a": nn.Conv2d(3, 6, 1), "b": nn.Conv2d(3, 6, 1), "psi": nn.Conv2d(6, 1, 1)}
    return Net(run, **layers, value=nn.Conv2d(3, 5, 3, padding=1), out=nn.Conv2d(5, 2, 1)), images()


def outer_product():
    """As in a state space: every channel of one layer meets all of another's."""

    def run(net, x):
        states = F.relu(net.a(x))[:, :, None] * net.b(x).tanh()[:, None]
        return net.c((states * net.d(x)[:, None]).sum(-1))

    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 3), "d": nn.Linear(4, 3)}
    return Net(run, **layers, c=nn.Linear(6, 2)), vectors(4, 4)


NETWORKS = {
    build.__name__: build
    for build in (
        *(residual, two_residuals, projection_shortcut, padded_shortcut_in_code, padded_shortcut_by_a_layer),
        *(depthwise, depth_multiplier, grouped, depthwise_on_the_input, transposed, dilated, concat, sliced),
        *(chunked_swiglu, swiglu, flattened_by_view, adaptive_pool, upsampled, shared_layer, unused_layer),
        *(single_channel, norm_without_affine, instance_norm, group_norm, one_group_norm, squeeze_and_excite),
        *(attention, hard_coded_attention, attention_by_products, grouped_queries, multihead_attention),
        *(transformer_layer, layer_norm_stream, rms_norm_stream, handmade_norm_stream),
        *(offset_norm_stream, hard_coded_reshape),
        *(conv1d, conv3d, embedding_stream, keywords, input_shortcut, scaled_by_a_parameter),
        *(unknown_operator, computed_weight, tied_weights, borrowed_weight, autocast, dead_end, in_place),
        *(softmax_between, noisy, weighted_features, handmade_batch_norms, learned_positions),
        *(counted_heads, one_key_head, added_parameter_is_summed, shuffled_pixels, unshuffled_pixels),
        *(vectors_to_images, unflattened, class_token, shuffled_channels, shuffled_by_views),
        *(interleaved_by_views, pooled_by_scores, single_head, gated_images, outer_product),
        *(
            matrices_of_parameters,
            channels_first_norm,
            size_of_another,
            parameters_of_a_layers_own,
            unread_sum,
        ),
        *(added_to_zeros, state_from_zeros, windows_of_images, filtered_images),
    )
}


def network(name):
    """A network of fixed random weights in evaluation mode, with norm statistics that do something."""
    torch.default_generator.manual_seed(0)
    model, batch = NETWORKS[name]()
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), batch


class Chain(nn.Module):
    """A convolutional network from blocks: names of what to do, each with a width."""

    def __init__(self, blocks):
        super().__init__()
        channels, self.blocks = 3, nn.ModuleList()
        for kind, width in blocks:
            block, channels = BLOCKS[kind](channels, width)
            self.blocks.append(block)
        self.out = nn.Linear(channels, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean((2, 3)))


def _plain(channels, width):
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()), width


def _residual(channels, width):
    def run(net, x):
        return x + net.b(F.relu(net.a(x)))

    return Net(run, a=nn.Conv2d(channels, width, 1), b=nn.Conv2d(width, channels, 1)), channels


def _padded(channels, width):
    def run(net, x):
        return net.a(x) + net.pad(x)

    pad = nn.ZeroPad3d((0, 0, 0, 0, width, 1))
    return Net(run, a=nn.Conv2d(channels, channels + width + 1, 1), pad=pad), channels + width + 1


def _concat(channels, width):
    def run(net, x):
        return torch.cat([net.a(x), x, F.silu(net.b(x))], 1)

    a, b = nn.Conv2d(channels, width, 1), nn.Conv2d(channels, width + 1, 1)
    return Net(run, a=a, b=b), channels + 2 * width + 1


def _depthwise(channels, width):
    layers = nn.Conv2d(channels, channels, 3, groups=channels, padding=1), nn.PReLU(channels)
    return nn.Sequential(*layers), channels


def _grouped(channels, width):
    layers = nn.Conv2d(channels, 2 * width, 1), nn.Conv2d(2 * width, 4 * width, 1, groups=width)
    return nn.Sequential(*layers, nn.GroupNorm(width, 4 * width)), 4 * width


def _gated(channels, width):
    def run(net, x):
        a, b = net.a(x).chunk(2, 1)
        return a * torch.sigmoid(b)

    return Net(run, a=nn.Conv2d(channels, 2 * width, 1)), width


def _excited(channels, width):
    def run(net, x):
        gate = net.up(F.relu(net.down(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gate)

    return Net(run, down=nn.Conv2d(channels, width, 1), up=nn.Conv2d(width, channels, 1)), channels


def _flat(channels, width):
    """Through a Linear and back."""

    def run(net, x):
        x = F.adaptive_max_pool2d(x, 2)
        return net.fc(x.view(x.size(0), -1)).unflatten(1, (-1, 1, 1))

    return Net(run, fc=nn.Linear(4 * channels, width)), width


def _up(channels, width):
    return nn.Sequential(
        nn.ConvTranspose2d(channels, width, 2, stride=2), nn.MaxPool2d(2), nn.Hardswish()
    ), width


def _twice(channels, width):
    def run(net, x):
        return net.a(F.relu(net.a(x)))

    return Net(run, a=nn.Conv2d(channels, channels, 1)), channels


BLOCKS = {
    "plain": _plain,
    "residual": _residual,
    "padded": _padded,
    "concat": _concat,
    "depthwise": _depthwise,
    "grouped": _grouped,
    "gated": _gated,
    "excited": _excited,
    "flat": _flat,
    "up": _up,
    "twice": _twice,
}


@st.composite
def chains(draw):
    """A random network of two to five blocks."""
    kinds = st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(2, 4))
    blocks = draw(st.lists(kinds, min_size=2, max_size=5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return Chain([("plain", 3), *blocks]).eval(), images(size=4)


def divided():
    """Divides by a norm that is zero for some samples once channels in front of it are gone."""

    def run(net, x):
        y = net.up(net.a(x).relu()).relu()
        y = y / y.norm(dim=-1, keepdim=True)
        return net.out(net.mid(y).relu())

    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 16), "up": nn.Linear(16, 12, bias=False)}
    model = Net(run, **layers, mid=nn.Linear(12, 10), out=nn.Linear(10, 3)).eval()
    with torch.no_grad():
        model.up.weight.abs_()
        model.a.bias.fill_(-0.2)
        model.a.weight[:12] *= 0.05
        # A single channel is never zero.
        model.a.weight[0], model.a.bias[0] = 0.0, 0.01
    return model, [torch.randn(64, 6) for _ in range(8)]


class Mixture(nn.Module):
    """Each row takes the best of some experts, in stacked matrices or in a list of networks."""

    def __init__(self, experts=6, top_k=2, *, listed=False, by_rows=False, width=5, inner=7):
        super().__init__()
        self.by_rows = by_rows
        self.num_experts, self.top_k = experts, top_k
        self.gate = nn.Linear(width, experts)
        if listed:
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
                for _ in range(experts)
            )
        else:
            self.experts = Fused(experts, width, inner)

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.by_rows == "masks":
            total = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                own = chosen == e
                rows = own.any(-1)
                total[rows] += (weights * own).sum(-1, keepdim=True)[rows] * expert(x[rows])
            return total
        if self.by_rows:
            total = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                rows, place = torch.where(chosen == e)
                total = total.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
            return total
        gates = torch.zeros(len(x), self.num_experts).scatter(-1, chosen, weights)
        return sum(gates[:, e, None] * self.experts[e](x) for e in range(self.num_experts))


class Fused(nn.Module):
    """Experts in two tensors and the biases of one."""

    def __init__(self, experts, width, inner):
        super().__init__()
        self.num_experts = experts
        self.up = nn.Parameter(torch.randn(experts, inner, width) / 2)
        self.up_bias = nn.Parameter(torch.randn(experts, inner) / 2)
        self.down = nn.Parameter(torch.randn(experts, width, inner) / 2)

    def __getitem__(self, e):
        return lambda x: F.linear(F.linear(x, self.up[e], self.up_bias[e]).relu(), self.down[e])


def mixture(**options):
    """A mixture between two layers, whose inputs are a shortcut around it."""
    torch.manual_seed(0)
    layers = {"mixture": Mixture(**options), "out": nn.Linear(5, 3)}
    return Net(lambda net, x: net.out(x + net.mixture(x)), **layers).eval(), vectors(40, 5)
