"""Plans may name network classes; nothing else that they name is imported or called."""

import dynamic_network_architectures.architectures.unet as unet
import pytest
from torch import nn

from nnunet_diffusion.networks.architectures import NETWORK_PACKAGES, network_class, refuse_unknown_classes, trusting

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
ARCHITECTURE = {
    "network_class_name": PLAIN,
    "arch_kwargs": {"conv_op": "torch.nn.modules.conv.Conv2d", "dropout_op": None},
    "_kw_requires_import": ["conv_op", "dropout_op"],
}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torch.nn.LeakyReLU", nn.LeakyReLU),
        ("torch.nn.modules.instancenorm.InstanceNorm3d", nn.InstanceNorm3d),
        (PLAIN, unet.PlainConvUNet),
        # where nnU-Net looks for architectures that have moved
        ("dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet", unet.ResidualEncoderUNet),
    ],
)
def test_network_classes_are_found(name, found):
    assert network_class(name) is found


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torch.hub.load",
        "torch.nn.functional.relu",
        "torch.nn.modules.module.torch.hub.load",
        "torch.nn.modules.conv.Module.__init__",
        "torch.nn.modules.utils.collections.OrderedDict",
        "dynamic_network_architectures.architectures.unet.nn",
        "dynamic_network_architectures.architectures.unet.nn.Conv2d",
        "dynamic_network_architectures.architectures.unet.InitWeights_He",
        "dynamic_network_architectures.gone.torch",
        "nnunetv2.run.run_training.os.remove",
        "dynamic_network_architectures..os",
        "",
        ["torch.nn.Conv2d"],
        None,
    ],
)
def test_anything_else_is_not(name):
    assert network_class(name) is None


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A package whose import leaves a trace, with a network in it."""
    (tmp_path / "evil_package").mkdir()
    source = f"import os\nfrom torch import nn\nos.mkdir({str(tmp_path / 'imported')!r})\nclass Net(nn.Module): pass\n"
    (tmp_path / "evil_package" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "imported"


def test_packages_are_imported_only_if_the_user_names_them(evil, monkeypatch):
    assert network_class("evil_package.Net") is None
    assert not evil.exists()
    monkeypatch.setenv(NETWORK_PACKAGES, "another, evil_package")
    assert network_class("evil_package.Net").__name__ == "Net"
    assert network_class("evil_package.os") is None
    assert evil.exists()


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"network_class_name": "torch.hub.load"}, "torch.hub.load"),
        ({"arch_kwargs": {"conv_op": "builtins.eval"}}, "builtins.eval"),
        # the denoiser takes over conv_op, whether nnU-Net would import it or not
        ({"arch_kwargs": {"conv_op": "evil_package.Net"}, "_kw_requires_import": []}, "evil_package.Net"),
        ({"arch_kwargs": {"block": ["os.system"]}, "_kw_requires_import": ["block"]}, "os.system"),
        ({"arch_kwargs": "text"}, "text"),
    ],
)
def test_architectures_are_refused_with_name_and_cure(evil, changes, value):
    refuse_unknown_classes(ARCHITECTURE, "a.json")
    with pytest.raises(ValueError, match=rf"^a\.json.*{value}"):
        refuse_unknown_classes({**ARCHITECTURE, **changes}, "a.json")
    assert not evil.exists()
    with trusting():
        refuse_unknown_classes({**ARCHITECTURE, **changes}, "a.json")
    with trusting(False), pytest.raises(ValueError):
        refuse_unknown_classes({**ARCHITECTURE, **changes}, "a.json")
