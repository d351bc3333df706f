"""Styles mixed within a batch: what a method becomes with MixStyle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedseg.algorithms.base import Algorithm
from fedseg.algorithms.functional.mixstyle import mixed
from fedseg.algorithms.recipe import Recipe
from fedseg.common.names import nearest
from fedseg.federation.contract import Batch


class Mixed(Algorithm):
    """A method in whose local steps images of a batch take some of each other's style.

    Mixed are the images as the network takes them, or what the parts of the network named in `training.mixstyle_after`
    answer, in second models too, as long as they train. Outside of local steps the network is as it was.
    """

    adds_up = False

    def __init__(self, model: nn.Module, recipe: Recipe, **settings: Any) -> None:
        super().__init__(model, recipe, **settings)
        parts = [name for name, _ in model.named_modules() if name]
        for name in recipe.training.mixstyle_after:
            if name not in parts:
                raise ValueError(f"training.mixstyle_after: {name!r} is no part of the network; {nearest(name, parts)}")
        self._mixing = False
        self._mixing_hooks: list[RemovableHandle] = []

    @property
    def mixes_patients(self) -> str:
        """What an image becomes follows from another one."""
        return super().mixes_patients or "styles of different patients' images are mixed (training.harmonise=mixstyle)"

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """From here on styles are mixed."""
        super().on_train_batch_start(batch, batch_idx)
        self._stop()
        after = self.recipe.training.mixstyle_after
        self._mixing = not after
        for name, module in self.named_modules() if after else ():
            if name.endswith(tuple(f".{part}" for part in after)):
                self._mixing_hooks.append(module.register_forward_hook(self._mix_answer))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """No longer."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._stop()

    def normalize(self, images: Tensor) -> Tensor:
        """The network's input; mixed where it is learnt from."""
        inputs = super().normalize(images)
        return self.in_layout(self._mix(inputs)) if self._mixing and torch.is_grad_enabled() else inputs

    def _stop(self) -> None:
        self._mixing = False
        while self._mixing_hooks:
            self._mixing_hooks.pop().remove()

    def _mix_answer(self, module: nn.Module, _: Any, answer: Any) -> Any:
        if not module.training:
            return answer
        if not isinstance(answer, Tensor) or answer.ndim < 3:
            raise ValueError(
                "training.mixstyle_after names a part of the network that does not answer with one feature map "
                f"({type(module).__name__}); name a part inside it, as encoder.layer1 of a ResNet"
            )
        return self._mix(answer)

    def _mix(self, features: Tensor) -> Tensor:
        training = self.recipe.training
        return mixed(features, training.mixstyle_probability, training.mixstyle_alpha)
