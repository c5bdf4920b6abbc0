"""The loss of a recipe: cross entropy with the labels, plus a sum of distillation methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit import losses
from toolkit.classifier import Classifier
from toolkit.features import Features, output_shapes, pair
from toolkit.progress import say
from toolkit.recipe import FeatureMethod, Method, Recipe, at


class Objective(nn.Module):
    """``ce_weight`` times the cross entropy with soft labels ``[B,K]``, plus ``kd_weight`` times the methods' sum.

    Methods on features read those of the last forward passes of ``student`` and ``teacher``, by hooks that are set
    here, after one dry pass of both has told which modules there are. Each method on logits is called once. So a
    ``RecipeError`` says what does not fit before the first step.
    What such a method trains (FitNets' regressors) are the parameters of this module. ``progress``, the fraction of
    the run that is done, decides what weights and temperature are. ``class_weights`` [K] multiply the labels' terms.
    """

    class_weights: Tensor | None

    def __init__(
        self, recipe: Recipe, student: nn.Module, teacher: nn.Module | None, class_weights: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.config, self.progress = recipe.loss, 0.0
        self.methods = {} if teacher is None else recipe.loss.methods or {"soft_targets": Method()}
        self.terms = nn.ModuleDict()
        self.pairs: dict[str, list[tuple[str, str]]] = {}
        by_features = {name: each for name, each in self.methods.items() if isinstance(each, FeatureMethod)}
        if teacher is None:
            return
        side, device = recipe.data.image_size, next(student.parameters()).device
        images = torch.zeros(2, 3, side, side, device=device)
        if by_features:
            self._hook(by_features, student, teacher, images)
        by_logits = {name: each for name, each in self.methods.items() if name not in by_features}
        if by_logits:
            self._add(by_logits, student, images)

    @property
    def hooked(self) -> bool:
        """Whether it reads features."""
        return bool(self.pairs)

    @torch.no_grad()
    def _add(self, methods: dict[str, Method], student: nn.Module, images: Tensor) -> None:
        training = student.training
        logits = student.eval()(images)
        student.train(training)
        for name, method in methods.items():
            self.terms[name] = losses.load(name).Term(method)
            self.terms[name](logits, logits, logits.softmax(1), 1.0)  # may refuse so few classes

    def _hook(self, methods: dict[str, FeatureMethod], student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
        inner = getattr(teacher, "network", None)  # of one that is resized for: ``external.External``
        root = inner if isinstance(inner, Classifier) else teacher
        theirs, ours = output_shapes(teacher, images, root), output_shapes(student, images)
        for name, method in methods.items():
            pairs = pair(method, name, ours, theirs)
            self.pairs[name] = pairs
            self.terms[name] = losses.load(name).Term(method, [(ours[one], theirs[other]) for one, other in pairs])
            if not method.layers:
                say(f"{name} compares {', '.join(f'{one} with {other}' for one, other in pairs)}")
        every = [paths for pairs in self.pairs.values() for paths in pairs]
        self.student = Features(student, (one for one, _ in every))
        self.teacher = Features(root, (other for _, other in every))

    def forward(self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
        logits = logits.float()
        loss = logits.new_zeros(())
        if self.config.ce_weight:
            smoothing, weight = self.config.label_smoothing, at(self.config.ce_weight, self.progress)
            # PyTorch would weigh what smoothing gives to the other classes by theirs: rare ones would win everywhere.
            weighted = labels if self.class_weights is None else labels * self.class_weights
            weighted = (1 - smoothing) * weighted + smoothing * weighted.mean(1, keepdim=True)
            loss = loss + weight * F.cross_entropy(logits, weighted)
        if teacher_logits is None:
            return loss
        weight, temperature = at(self.config.kd_weight, self.progress), at(self.config.temperature, self.progress)
        for name, term in self.terms.items():
            if name in self.pairs:
                ours = [self.student.kept[one] for one, _ in self.pairs[name]]
                theirs = [self.teacher.kept[other] for _, other in self.pairs[name]]
                value = term(ours, theirs)
            else:
                value = term(logits, teacher_logits, labels, temperature)
            loss = loss + weight * at(self.methods[name].weight, self.progress) * value
        return loss
