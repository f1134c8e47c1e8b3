"""Write documentation/settings.md from the dataclass of settings: `python documentation/make_settings.py`."""

from __future__ import annotations

from pathlib import Path

from nnunet_diffusion.model.settings import settings_table

TARGET = Path(__file__).with_name("settings.md")
TEMPLATE = """# Settings

Made by `python documentation/make_settings.py`; do not edit.

All settings live in the plans, under `configurations.<name>.diffusion`, in sections by what they belong to, such as
`{{"inference": {{"start_step": 300, "steps": 5}}}}`. Plans without settings, or with a part of them, get the defaults
below. An unknown key, a wrong type or an illegal value is refused with the key, the value and what is legal.
How to set them, with an example: [quick start](quick_start.md#settings).

{table}
With `denoiser` `nnunet` the defaults of `prediction_type` (`logits`), `signal_scale` (0.1) and `mirror_samples` (true) differ.
With `hidiff` those of `prediction_type` (`flip`), `timesteps`, `max_train_step` and `start_step` (10), `starts`
(`{{"truth": 1}}`) and `mirror_samples` (true) differ. `signal_scale` 1, these `starts`, `start_step` = `timesteps` and
`from_noise` false are then the only legal values, `ddim` and `ddpm` the only samplers.
`nnunet_diffusion plan -denoiser hidiff` writes a complete section.

Three defaults follow the plans: `features_per_stage` is half of nnU-Net's width at each stage, at least 8; `norm` is
`batch` for batches of 8 or more and `instance` below; `starts` is `{{"truth": 1}}` for the prediction types `epsilon` and
`v`.

What must fit together: `start_step` is at most `max_train_step`, and that at most `timesteps`; `steps` is at most `start_step`;
`from_noise` needs `start_step` equal to `timesteps`; the shares of `starts` add up to 1, with `epsilon` or `v` all of them are
`truth`, and with `condition_on_presegmentation` none is. `out_of_fold` does not go with `start_from` `previous_stage`.
`linear` needs at least
21 `timesteps`. `dpm_solver`, `dpm_solver++` and `unipc` need the extra `solvers`. `eta` matters to `ddim` only.

The section `inference` may be changed
[after training](quick_start.md#changing-inference-after-training); all others are fixed by it. Plans of earlier versions,
which had all keys side by side without sections, are read as what they meant.
"""


def text() -> str:
    """Content of settings.md."""
    return TEMPLATE.format(table=settings_table())


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
