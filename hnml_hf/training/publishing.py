"""[`PublishingMixin`]: what a trainer sends to the Hub, whenever it does, is `PUBLISHED` of `hub/upload.py`."""

import json
import os
import shutil
import tempfile
from functools import partial
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ..hub import upload as hub
from ..hub.model_card import generate_model_card


logger = logging.get_logger(__name__)


class PublishingMixin:
    """The Hub methods of transformers' Trainer: private by default, with a card, and the weights that were measured.

    For a Trainer with `evaluated_model`, `as_it_is_saved`, `card_facts` and `_evaluated`.
    """

    args: Any

    def init_hf_repo(self, token=None, private=None):
        if self.is_world_process_zero():
            self.hub_model_id = hub.create_repo(
                self._repo_name(), private=self._private(private), token=token or self.args.hub_token
            )
            self.push_in_progress = None

    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))

    def _private(self, private: bool | None) -> bool:
        """Private, unless it was asked otherwise."""
        return next((choice for choice in (private, self.args.hub_private_repo) if choice is not None), True)

    def create_model_card(self, model_name=None, license=None, tags=None, finetuned_from=None, dataset=None, **facts):
        """Write the card of this run into `output_dir`. What is given is kept for later cards of this trainer.

        `facts`: `noise`, `command` and `split` of [`~hnml_hf.hub.model_card.generate_model_card`].
        """
        given = {
            "model_name": model_name,
            "license": license,
            "tags": tags,
            "start": finetuned_from,
            "dataset": dataset,
            **facts,
        }
        self.card_facts.update({name: value for name, value in given.items() if value is not None})
        if not self.is_world_process_zero():
            return
        data = self.train_dataset
        with open(os.path.join(self.args.output_dir, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        generate_model_card(
            self.args.output_dir,
            args=self.args,
            config=config,
            log_history=self.state.log_history,
            labels=torch.empty(0).numpy() if data is None else data.labels,
            clean_labels=torch.empty(0).numpy() if data is None else data.clean_labels,
            evaluated=self._evaluated,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            repo_id=self.hub_model_id,
            max_steps=self.state.global_step,
            **{"dataset_license": None if data is None else data.dataset.info.license, **self.card_facts},
        )

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **facts
    ):
        """Save, write the card and upload the published files of `output_dir`; a new repository is private.

        `facts` go to [`~HNMLTrainer.create_model_card`]. Returns huggingface_hub's `CommitInfo`, or a future of it.

        Raises:
            HubError: the push did not arrive; `output_dir` is complete.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self.create_model_card(**facts)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push = partial(
            hub.push_to_hub,
            self.args.output_dir,
            self._repo_name(),
            private=self._private(private),
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def push_checkpoint(self):
        """Upload the weights that evaluation measured, in the background. A push that fails does not stop training."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        with self.as_it_is_saved(self.evaluated_model()):  # by all processes
            if self.is_world_process_zero():
                self._push_checkpoint()

    def _push_checkpoint(self):
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        aside = tempfile.mkdtemp(prefix="_push-", dir=self.args.output_dir)  # checkpoints are deleted while it uploads
        self.evaluated_model().save_pretrained(aside)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(aside)
        self._finish_current_push()
        job = HfApi().run_as_future(self._push_aside, aside, f"Training in progress, step {self.state.global_step}")
        self.push_in_progress = PushInProgress([job])

    def _push_aside(self, folder: str, commit_message: str):
        try:
            hub.push_to_hub(
                folder,
                self._repo_name(),
                private=self._private(None),
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                commit_message=commit_message,
            )
        except hub.HubError as error:
            logger.warning(f"{error} Training goes on.")
        finally:
            shutil.rmtree(folder)
