"""Plain modules for `ForwardModeNetwork`: a DiT's value path, and modules that break its rules."""

import copy

import torch
from diffusers import UNet2DModel
from torch import nn

from meanflow_core.networks.dit import MeanFlowDiT
from meanflow_core.networks.forward_mode import ForwardModeNetwork
from meanflow_core.networks.interface import Conditioning


class PlainDiT(nn.Module):
    """The DiT as a plain module: its u alone, without du/dt. checkpointing: of its blocks' activations."""

    def __init__(self, checkpointing=False, **arguments):
        super().__init__()
        self.dit = MeanFlowDiT(**arguments)
        if checkpointing:
            self.dit.enable_gradient_checkpointing()

    def forward(self, z, t, h, labels):
        return self.dit(z, Conditioning(t=t, r=t - h, labels=labels)).u


def in_forward_mode(network: MeanFlowDiT, **arguments) -> ForwardModeNetwork:
    """The same network, with the same parameters, as a plain module."""
    config = {name: value for name, value in network.config.items() if not name.startswith("_")}
    sizes = {name: config.pop(name) for name in ("sample_size", "in_channels", "num_classes")}
    plain = ForwardModeNetwork(f"{__name__}:PlainDiT", {**config, **arguments}, **sizes)
    plain.module.dit.load_state_dict(copy.deepcopy(network.state_dict()))
    return plain.to(network.dtype).train(network.training)


class UNet(nn.Module):
    """A small U-Net of diffusers, with group normalization after attention."""

    def __init__(self, sample_size, in_channels, num_classes):
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            class_embed_type="identity",
        )
        self.classes = nn.Embedding(num_classes + 1, 64)
        self.step_size = nn.Linear(1, 64)

    def forward(self, z, t, h, labels):
        return self.unet(z, t, class_labels=self.classes(labels) + self.step_size(h[:, None])).sample


class Layer(nn.Module):
    """Base of the modules below: `layer` on z, scaled by t."""

    def __init__(self, sample_size, in_channels, num_classes):
        super().__init__()
        self.scale = nn.Linear(1, in_channels)
        self.layer = self.make_layer(sample_size, in_channels)

    def make_layer(self, size, channels):
        raise NotImplementedError

    def forward(self, z, t, h, labels):
        return self.layer(z) * self.scale((t + h)[:, None])[:, :, None, None]


class Attention(Layer):
    """torch's own transformer layers, which take a fused path in evaluation mode."""

    def make_layer(self, size, channels):
        tokens = nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(size * size, 2, 16, 0.0, batch_first=True))
        return nn.Sequential(tokens, nn.Unflatten(2, (size, size)))


class WithWidths(Layer):
    """Takes a sequence."""

    def __init__(self, widths, **sizes):
        super().__init__(**sizes)
        self.widths = widths

    def make_layer(self, size, channels):
        return nn.Identity()


class OtherShape(Layer):
    """Returns half as many rows of latent pixels."""

    def make_layer(self, size, channels):
        return nn.AvgPool2d((2, 1))


class WithDropout(Layer):
    """Random."""

    def make_layer(self, size, channels):
        return nn.Dropout(0.1)


class WithAttentionDropout(Layer):
    """Random, by a number of a layer."""

    def make_layer(self, size, channels):
        return nn.TransformerEncoderLayer(size, 2, 16, 0.1)


class OtherForward(Layer):
    """Does not take t - r."""

    def make_layer(self, size, channels):
        return nn.Identity()

    def forward(self, z, t, labels):
        return self.layer(z)


class FailsOnData(Layer):
    """Multiplies matrices of other sizes."""

    def make_layer(self, size, channels):
        return nn.Linear(size + 1, size)


class WithBatchNorm(Layer):
    """Mixes the rows of a batch."""

    def make_layer(self, size, channels):
        return nn.BatchNorm2d(channels)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class WithCustomFunction(Layer):
    """An autograd function without jvp."""

    def make_layer(self, size, channels):
        return _Square.apply


class WithOldCustomFunction(Layer):
    """An autograd function without setup_context."""

    def make_layer(self, size, channels):
        class Old(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * x

        return Old.apply


class WithUnsupportedOperation(Layer):
    """An operation for which torch has no forward-mode AD."""

    def make_layer(self, size, channels):
        return lambda z: torch.cdist(z, z)


class WithOutArgument(Layer):
    """Writes into a tensor of its own."""

    def make_layer(self, size, channels):
        return lambda z: torch.mul(z, z, out=torch.empty_like(z))


class ReadsValues(Layer):
    """Branches on a value. Trains, but cannot run without data."""

    def make_layer(self, size, channels):
        return lambda z: z * 2 if z.abs().sum() > 0 else z


class WithoutSizes(nn.Module):
    """Does not take the sizes of the data."""

    def __init__(self, width=3):
        super().__init__()


def not_a_class(**arguments):
    """Builds a module, but is a function."""
    return Attention(**arguments)
