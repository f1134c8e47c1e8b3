"""DiffusionTrainer, for `nnUNetv2_train ... -tr DiffusionTrainer`: nnU-Net's trainer with another network and step."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_diffusion.model.build import build_objective
from nnunet_diffusion.model.corrupted_truth import Mistakes
from nnunet_diffusion.model.precision import has_bfloat16, training_precision
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.hidiff import HiDiffRefiner
from nnunet_diffusion.networks.noisy_unet import NoisyUNet
from nnunet_diffusion.training import job
from nnunet_diffusion.training.cascade import refuse_incomplete_previous_stage
from nnunet_diffusion.training.checkpoints import remove_what_killed_jobs_left, write_checkpoint
from nnunet_diffusion.training.checks import check_batch, refuse_unusable_folders
from nnunet_diffusion.training.curves import draw_curves, log_terms
from nnunet_diffusion.training.learner import Learner, averaged_weights, compile_and_distribute, train_step
from nnunet_diffusion.training.network import build_segmenter
from nnunet_diffusion.training.outlook import announce
from nnunet_diffusion.training.plans import adopt, notes, planned_settings, share_settings_of_folds, with_presegmentor
from nnunet_diffusion.training.presegmentor import given_presegmentor, presegmentor_weights
from nnunet_diffusion.training.raters import prepare_raters, with_raters
from nnunet_diffusion.training.replacing import keep_finished, what_happens_to_finished
from nnunet_diffusion.training.starts import first_recycling_epoch, prepare_mistakes, prepare_networks
from nnunet_diffusion.training.state import checkpoint_of, own_checkpoint, restore
from nnunet_diffusion.training.steps import SkippedSteps
from nnunet_diffusion.training.verdict import give_verdict

RANK_SEEDS = 1_000_003  # more than any number of epochs, so that no rank repeats another's noise


class DiffusionTrainer(nnUNetTrainer):
    """nnU-Net trainer for a denoiser, which starts from the segmentation of a frozen nnU-Net.

    Planning, preprocessing, augmentation, folds, logging, validation and export are nnU-Net's. The denoiser is trained with
    AdamW and nnU-Net's poly schedule. Its moving average (EMA) is validated, saved as `network_weights` and used for
    inference. `checkpoint_best` is chosen by a proxy Dice: one sample, one step, without averaging the pre-segmentation in.

    Raises:
        NotImplementedError: the settings start from the previous stage, but the labels are regions.
        RuntimeError: nnU-Net's folders are not set.
        ValueError: the plans are for another dataset, or their `diffusion` section is not valid.
    """

    network: Any
    settings: DiffusionSettings
    epochs: int | None = None  # set by the trainers of other lengths; None for nnU-Net's 1000
    presegmentor_trainer = "nnUNetTrainer"
    denoiser: str | None = None  # set by the trainers of one denoiser; None for that of the plans

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        """Initialise nnU-Net's trainer, read the settings and write them into the plans."""
        refuse_unusable_folders()
        # checked before nnU-Net creates the output folder
        settings = planned_settings(plans, configuration, dataset_json, self.denoiser)
        # otherwise Weights & Biases would put the pre-segmentor's curves into this network's run
        os.environ.setdefault("WANDB_REINIT", "create_new")
        super().__init__(plans, configuration, fold, dataset_json, device)
        for line in notes(self.configuration_manager.configuration, self.denoiser):
            self.print_to_log_file(line)
        self.given_presegmentor = given_presegmentor(fold, self.configuration_manager.patch_size)
        adopt(self, with_presegmentor(settings, self.given_presegmentor, self.presegmentor_trainer))
        if self.epochs is not None:
            self.num_epochs = self.epochs
        self.enable_deep_supervision = False
        self.save_every = 1
        self.learners: dict[str, Learner] = {}
        self.resumed = self.saved = False
        self.mistakes: Mistakes | None = None  # of the pre-segmentor, measured before the first epoch
        self._skipped = SkippedSteps()

    # the network -----------------------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the segmenter from the plans alone, as inference requires; it has one output, whatever nnU-Net asks for."""
        channels = num_input_channels, num_output_channels
        return build_segmenter(plans_manager, configuration_manager, *channels, DiffusionTrainer.presegmentor_trainer)

    @property
    def segmenter(self) -> DiffusionSegmenter:
        """The network without its wrapper, if it has one."""
        return cast(DiffusionSegmenter, getattr(self.network, "module", self.network))

    def initialize(self) -> None:
        """Build network, optimizer and loss as nnU-Net does, then set up moving average, compilation and precision."""
        super().initialize()
        self.segmenter.ignore_label = self.label_manager.ignore_label
        # nnU-Net wraps the whole network for distributed training; here only the learners, which have gradients, are wrapped
        self.network = self.segmenter
        self.objective = build_objective(self.segmenter)
        self.learners = {
            name: Learner(getattr(self.segmenter, name), evaluate, self.optimizers[name], self.settings.ema_decay)
            for name, evaluate in self.objective.evaluations.items()
        }
        wrap = (lambda module: nnunet_trainer.DDP(module, device_ids=[self.local_rank])) if self.is_ddp else None
        compile_and_distribute(self.learners, super()._do_i_compile(), wrap, self.print_to_log_file)
        if has_bfloat16(self.device) or self.settings.precision != "auto":
            self.grad_scaler = None  # bfloat16 has float32's range

    def _do_i_compile(self) -> bool:
        """Return False, so that nnU-Net does not compile the whole network: its reverse process is a Python loop."""
        return False

    def plot_network_architecture(self) -> None:
        """Do nothing: nnU-Net draws with a package that cannot draw this network."""

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: the segmenter has one output; deep supervision is its objective's (`DenoisingObjective.segmentation`)."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """Make an AdamW for each network that learns; return the denoiser's, and nnU-Net's learning rate schedule for all."""
        self.optimizers = {
            name: torch.optim.AdamW(
                getattr(self.segmenter, name).parameters(),
                self.initial_lr,
                weight_decay=self.weight_decay,
                fused=self.device.type
                != "mps",  # updating hundreds of small tensors one by one takes ten times as long
            )
            for name in self.settings.learning_networks
        }
        self._schedules = [
            PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs) for optimizer in self.optimizers.values()
        ]
        return self.optimizers["denoiser"], self._schedules[0]

    # training --------------------------------------------------------------------------------------------------------

    def run_training(self) -> None:
        """Train as nnU-Net does, alone in the output folder, and explain errors from data that can no longer be loaded."""
        with job.alone_and_tidy(self):
            for line in what_happens_to_finished(self, self.resumed):
                self.print_to_log_file(line)
            with job.lost_data_explained(self):
                super().run_training()

    def on_train_start(self) -> None:
        """Train the pre-segmentor if necessary and embed it, then start as nnU-Net does."""
        if not self.was_initialized:
            self.initialize()
        share_settings_of_folds(self)
        if self.is_cascaded:
            refuse_incomplete_previous_stage(self, [case for part in self.do_split() for case in part])
        job.describe(self)
        if not self.resumed:
            self._embed_presegmentor()
        job.warn(self)
        remove_what_killed_jobs_left(Path(self.output_folder))
        prepare_raters(self)
        prepare_networks(self)
        super().on_train_start()
        prepare_mistakes(self)
        announce(self, "two networks" if self.settings.is_hidiff else "denoiser", self.print_to_log_file)

    def _embed_presegmentor(self) -> None:
        weights = presegmentor_weights(self)
        self.segmenter.presegmentor.load_state_dict(weights)
        if isinstance(self.segmenter.denoiser, NoisyUNet):
            fresh = self.segmenter.denoiser.start_from(weights)
            self.print_to_log_file(f"The denoiser starts from {'nnU-Net' if fresh else 'pretrained'} weights.")
        elif isinstance(self.segmenter.denoiser, HiDiffRefiner) and self.segmenter.denoiser.is_trained:
            self.print_to_log_file(
                "The refiner starts from pretrained weights; nnU-Net's weights are those of this fold's own training."
            )

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """Return nnU-Net's datasets; in training with the labels of all raters in the settings."""
        training, validation = super().get_tr_and_val_datasets()
        return with_raters(self, training), validation

    def on_train_epoch_start(self) -> None:
        """Seed the noise of the epoch, so that a resumed training draws the same noise as an uninterrupted one."""
        super().on_train_epoch_start()
        for schedule in self._schedules[1:]:  # nnU-Net has moved the first
            schedule.step(self.current_epoch)
        self._generator = torch.Generator(self.device).manual_seed(
            self.settings.seed + 1 + self.current_epoch + RANK_SEEDS * self.local_rank
        )
        self.objective.begin_epoch(recycling=self.current_epoch >= first_recycling_epoch(self.num_epochs))

    def train_step(self, batch: dict) -> dict:
        """Take one optimizer step. Return the loss, its terms and whether the step was taken (see `take_step`)."""
        check_batch(batch, self)
        image = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"].to(self.device, non_blocking=True)
        found, taken = train_step(self.objective, self.learners, image, target, self.loss, self._generator,
                                  self._autocast, self.grad_scaler, batch.get("keys", ()))  # fmt: skip
        self._skipped.note(taken, self.current_epoch, batch.get("keys"))
        # read all values at once and last, because each read waits for the GPU
        values = dict(zip(found, torch.stack(list(found.values())).detach().tolist(), strict=True))
        return {**values, "taken": taken}

    def _autocast(self) -> AbstractContextManager:
        return training_precision(self.device, self.settings.precision)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the loss and each of its terms without skipped steps, and the number of skipped steps."""
        told = self._skipped.told(len(train_outputs))
        if told is not None:
            self.print_to_log_file(told)
        # all ranks leave out the same steps, because nnU-Net puts their losses into one array
        train_outputs = [output for output in train_outputs if output["taken"]] or train_outputs
        super().on_train_epoch_end(train_outputs)
        log_terms(self, train_outputs)

    def validation_step(self, batch: dict) -> dict:
        """Validate a batch as nnU-Net does, with averaged weights, one sample, one step and no averaging with nnU-Net."""
        check_batch(batch, self)
        proxy = self.segmenter.overridden(steps=1, samples=1, presegmentation_weight=0.0)
        with averaged_weights(self.segmenter, self.learners), proxy:
            return super().validation_step(batch)

    def on_epoch_end(self) -> None:
        """End the epoch as nnU-Net does and draw the curves of the loss terms."""
        self.print_to_log_file("Pseudo dice below is a proxy: one step from the pre-segmentation with averaged weights")
        super().on_epoch_end()
        if self.local_rank == 0:
            draw_curves(self)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, with averaged weights and the inference settings; then compare with the pre-segmentor."""
        share_settings_of_folds(self)  # they may have been tuned
        with job.alone_and_tidy(self), averaged_weights(self.segmenter, self.learners):
            super().perform_actual_validation(save_probabilities)
            if self.local_rank == 0:
                give_verdict(self)

    # checkpoints -----------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with the averaged weights as `network_weights` and the raw weights under another key."""
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        if not (self.saved or self.resumed):
            keep_finished(Path(self.output_folder))
        write_checkpoint(checkpoint_of(self), filename)
        self.saved = True

    def load_checkpoint(self, filename_or_checkpoint: dict | str | Path) -> None:
        """Restore a training from a checkpoint, including its settings.

        Raises:
            ValueError: the checkpoint is not from a diffusion trainer of this dataset, configuration and fold.
        """
        checkpoint = own_checkpoint(self, filename_or_checkpoint)
        if not self.was_initialized:
            saved = PlansManager(checkpoint["init_args"]["plans"]).get_configuration(self.configuration_name)
            adopt(self, DiffusionSettings.from_plans(saved.configuration))
            self.initialize()
        restore(self, checkpoint)
        self.resumed = True
