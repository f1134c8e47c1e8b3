"""Small networks of nnU-Net, as its planner would build them."""

from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

WIDTHS = (4, 6, 8)


def small_unet(channels=1, classes=3, residual=False, dimension=2, deep_supervision=False):
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimension == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    kind, blocks = (
        (ResidualEncoderUNet, {"n_blocks_per_stage": [1, 1, 1]})
        if residual
        else (PlainConvUNet, {"n_conv_per_stage": [2, 2, 2]})
    )
    return kind(
        channels,
        3,
        list(WIDTHS),
        conv,
        3,
        [1, 2, 2],
        num_classes=classes,
        n_conv_per_stage_decoder=[1, 1],
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        deep_supervision=deep_supervision,
        **blocks,
    )
