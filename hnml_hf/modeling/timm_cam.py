"""A timm classifier with its native head, as a transformers model that also gives class activation maps.

What it saves is an ordinary checkpoint: timm (`local-dir:`), `AutoModelForImageClassification` and `pipeline` load the
same folder without this package.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import TimmWrapperConfig
from transformers.modeling_outputs import ModelOutput
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification

from ..common.finite import require_finite_weights
from .cam import class_activation_maps, head_gradient_activation, normalize_cams
from .forward import evaluation_mode
from .saving import SavedModelMixin
from .timm_backbone import backbone_config, classifiers, pretrained_state, require_linear_classifier


@dataclass
class TimmCAMOutput(ModelOutput):
    """What the model says of a batch (b images, k classes, d features, r regions; map of h x w cells, c channels).

    Args:
        loss (`torch.Tensor` of shape `()`): cross-entropy, if labels were given.
        logits (`torch.Tensor` of shape `(b, k)`): the classifier's output.
        features (`torch.Tensor` of shape `(b, d)`): input of the last linear layer (timm's `pre_logits`).
        feature_maps (`torch.Tensor` of shape `(b, c, h, w)`): the map before pooling, channels first.
        last_hidden_state (`torch.Tensor`): the same map in the backbone's own layout, prefix tokens included.
        cams (`torch.Tensor` of shape `(b, h, w)`): raw class activation maps, if classes were asked for.
        region_features (`torch.Tensor` of shape `(r, b, d)`): features of the masked maps, if masks were given.
        region_logits (`torch.Tensor` of shape `(r, b, k)`): the classifier's output on them.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    features: torch.Tensor | None = None
    feature_maps: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    cams: torch.Tensor | None = None
    region_features: torch.Tensor | None = None
    region_logits: torch.Tensor | None = None


class TimmCAMForImageClassification(SavedModelMixin, TimmWrapperForImageClassification):
    """A whole timm classifier that also returns its feature map, its pooled features and class activation maps.

    The configuration is transformers' own [`TimmWrapperConfig`]; there is no parameter beside timm's own. Use
    [`~TimmCAMForImageClassification.from_timm`] to start from a timm name and `from_pretrained` for a saved folder or
    a Hub id (`timm/...` or one trained here).

    Args:
        config (`TimmWrapperConfig`): architecture and classes; the weights are random.
        needs_cams (`bool`): whether an architecture without class activation maps is refused. One that has none gives
            features alone.

    Raises:
        ValueError: if the architecture has no single final linear layer, so that no class activation map is defined.

    Example:

        model = TimmCAMForImageClassification.from_timm("resnet18", num_labels=10, image_size=64)
        output = model(torch.rand(2, 3, 64, 64), cam_classes="predicted")
        output.logits.shape, output.cams.shape
    """

    batch_norm_frozen = False  # for training alone; it is not saved
    normalize_cams = staticmethod(normalize_cams)

    def __init__(self, config: TimmWrapperConfig, needs_cams: bool = True):
        # timm writes `num_classes` into `model_args` of its own checkpoints, transformers passes it a second time
        config.model_args = {
            k: v for k, v in (config.model_args or {}).items() if k not in ("num_classes", "label_names")
        }
        super().__init__(config)
        if needs_cams:
            require_linear_classifier(self.timm_model, config.architecture)
        self._pool_is_mean: bool | None = None

    def train(self, mode: bool = True):
        """As in PyTorch; but while `batch_norm_frozen`, batch norms stay with the statistics that they have."""
        super().train(mode)
        if self.batch_norm_frozen:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def post_init(self):
        # timm has initialized its parameters already; the inherited initialization would draw them again from N(0,
        # 0.02). Marked ones are left alone; what a checkpoint lacks (on the meta device here) is still initialized.
        for parameter in self.parameters():
            if not parameter.is_meta:
                parameter._is_hf_initialized = True
        super().post_init()

    @classmethod
    def from_timm(
        cls,
        architecture: str,
        *,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        pretrained: bool | str | Path = False,
        image_size: int | None = None,
        needs_cams: bool = True,
        **model_args,
    ) -> "TimmCAMForImageClassification":
        """Build the model from a timm name.

        Args:
            architecture (`str`): a name from `timm.list_models()`, with or without a pretrained tag.
            num_labels (`int`, *optional*): number of classes; taken from `id2label` if that is given.
            id2label (`dict[int, str]`, *optional*): class names in id order.
            pretrained (`bool`, `str` or `Path`): `True` takes timm's weights from the Hub, a path takes a local
                safetensors file with timm's names or a folder that was saved here. A head of another size is replaced
                by a fresh one.
            image_size (`int`, *optional*): side of the square input in pixels; default: the backbone's own.
            needs_cams (`bool`): whether a backbone that can give no activation maps, at this size or at all, is
                refused.
            model_args: any other JSON-able argument of `timm.create_model`.

        Raises:
            NonFiniteError: pretrained weights that are not finite.
            ValueError: unknown name, images that are not RGB or of a size that the backbone does not take, or, where
                maps are needed, no linear classifier or a feature map of one cell at this size.
        """
        if id2label is not None and num_labels not in (None, len(id2label)):
            raise ValueError(
                f"`num_labels={num_labels}` but `id2label` has {len(id2label)} entries; give one of them."
            )
        num_labels = num_labels if id2label is None else len(id2label)
        if not num_labels or num_labels < 2:
            raise ValueError(f"`num_labels={num_labels}`: a classifier needs at least two classes.")
        id2label = {int(i): str(name) for i, name in (id2label or {i: str(i) for i in range(num_labels)}).items()}
        config = backbone_config(
            architecture, id2label=id2label, image_size=image_size, needs_cams=needs_cams, model_args=model_args
        )
        model = cls(config, needs_cams)
        if pretrained:
            of = f"the weights of `{architecture if pretrained is True else pretrained}`"
            try:
                model.timm_model.load_state_dict(pretrained_state(architecture, config, pretrained))
            except RuntimeError as error:
                _, *parts = str(error).split("\n\t")  # PyTorch lists every weight
                if not parts or "state_dict" not in str(error):  # as when the weights did not come
                    raise
                first = parts[0].rstrip(". ")
                raise ValueError(
                    f"{of[0].upper()}{of[1:]} do not fit `{architecture}` with the arguments {model_args}: {first}. "
                    "Give the backbone and the arguments (`--model_args`) that they were trained with."
                ) from error
            require_finite_weights(model.state_dict(), of=of, advice="Take others.")
        model.check_spatial_evidence() if needs_cams else model.check_image_size()
        return model

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the backbone was built for."""
        return tuple(self.config.pretrained_cfg["input_size"])

    @torch.no_grad()
    def check_image_size(self) -> torch.Tensor:
        """Return the native feature map of a black image, or say that the backbone takes none of this size.

        Raises:
            ValueError: if it does not.
        """
        name, (_, height, width) = self.config.architecture, self.input_size
        try:
            with evaluation_mode(self):
                return self.timm_model.forward_features(
                    torch.zeros(1, *self.input_size, device=self.device, dtype=self.dtype)
                )
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"Backbone `{name}` takes no images of {height}x{width} pixels: {str(error).rstrip('. ')}. Choose "
                "another `image_size`."
            ) from error

    def check_spatial_evidence(self) -> tuple[int, int]:
        """Return the height and width of the feature map, or say why this backbone can give no activation maps.

        Raises:
            ValueError: if the backbone takes no images of this size, the map has a single cell, or the head ignores
                the map (class-token pooling).
        """
        native, name, (_, height, width) = self.check_image_size(), self.config.architecture, self.input_size
        grid = tuple(self.to_feature_maps(native).shape[-2:])
        if grid == (1, 1):
            raise ValueError(
                f"Backbone `{name}` has a feature map of 1x1 cell at {height}x{width} pixels, so it has no spatial "
                "evidence for activation maps. Use larger images or a smaller stride (`output_stride`, `patch_size`)."
            )
        self._check_head(native)
        return grid

    def _check_head(self, native: torch.Tensor):
        """Raise `ValueError` unless the head pools the cells of the map and then applies the last linear layer."""
        sample = torch.randn(native.shape, generator=torch.Generator().manual_seed(0)).to(native).requires_grad_()
        with evaluation_mode(self):
            with torch.enable_grad():
                pooled = self.pool(sample)
                (gradient,) = torch.autograd.grad(pooled.square().sum() + pooled[..., ::2].sum(), sample)
            expected = self.timm_model.forward_head(sample)
        name = self.config.architecture
        if self.to_feature_maps(gradient).abs().max() == 0:
            raise ValueError(
                f"Backbone `{name}` classifies by its class token, so its feature map carries no evidence. Build it "
                'with `global_pool="avg"` (and `fc_norm=False` for weights trained with a class token).'
            )
        fits = pooled.shape[-1] == self.class_weights.shape[-1]
        if not fits or not torch.allclose(self.classify(pooled), expected, rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"The head of backbone `{name}` is not a pooling followed by one linear layer, so it has no class "
                "activation maps. Choose another backbone, for example `resnet50` or `convnext_tiny`."
            )

    # -- the parts of the head ----------------------------------------------------------------------------------------

    @property
    def classifiers(self) -> tuple[nn.Module, ...]:
        """The last linear layer; two of them where timm averages the outputs of two heads on the same features."""
        return classifiers(self.timm_model)

    @property
    def class_weights(self) -> torch.Tensor:
        """Weight of the last linear layer, of shape `(k, d)`."""
        return _mean([classifier.weight.flatten(1) for classifier in self.classifiers])

    @property
    def class_bias(self) -> torch.Tensor:
        """Bias of the last linear layer, of shape `(k,)`; zeros if it has none."""
        return _mean([_bias(classifier) for classifier in self.classifiers])

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Last linear layer: `(b, d)` to `(b, k)`."""
        logits = [
            classifier(features[..., None, None] if isinstance(classifier, nn.Conv2d) else features).flatten(1)
            for classifier in self.classifiers
        ]
        return _mean(logits)

    @property
    def pools_by_mean(self) -> bool:
        """Whether the head averages its map before the last linear layer, so that its CAM is a weighted sum of it.

        Known after the first maps.
        """
        return bool(self._pool_is_mean)

    def pool(self, native: torch.Tensor) -> torch.Tensor:
        """What the head does before its last linear layer.

        Args:
            native (`torch.Tensor` of shape `(b, c, h, w)`, `(b, h, w, c)` or `(b, tokens, c)`): the backbone's map in
                its own layout.

        Returns:
            `torch.Tensor` of shape `(b, d)`.
        """
        return self.timm_model.forward_head(native, pre_logits=True).flatten(1)

    def to_feature_maps(self, native: torch.Tensor) -> torch.Tensor:
        """The backbone's map with channels first, the layout of everything else here.

        Args:
            native (`torch.Tensor` of shape `(b, c, h, w)`, `(b, h, w, c)` or `(b, tokens, c)`): in any of timm's three
                layouts; tokens that are no cell of the map, as the class token, come first and are left out.

        Returns:
            `torch.Tensor` of shape `(b, c, h, w)`.

        Raises:
            ValueError: if it is no such tensor, or its tokens form no grid.
        """
        if not isinstance(native, torch.Tensor) or native.ndim not in (3, 4):
            raise ValueError(
                f"Backbone `{self.config.architecture}` has no single feature map; choose another backbone."
            )
        if native.ndim == 4:
            return native.permute(0, 3, 1, 2) if getattr(self.timm_model, "output_fmt", "NCHW") == "NHWC" else native
        tokens = native[:, getattr(self.timm_model, "num_prefix_tokens", 0) :]
        height, width = self._grid(tokens.shape[1])
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def _grid(self, cells: int) -> tuple[int, int]:
        height, width = self.input_size[-2:]
        rows = round((cells * height / width) ** 0.5)
        if rows == 0 or cells % rows:
            raise ValueError(f"Backbone `{self.config.architecture}` gives {cells} tokens, which form no grid.")
        return rows, cells // rows

    def _masked(self, native: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Native map times a `(b, h, w)` mask, divided by the mask's mean so that an average stays an average."""
        scaled = (mask / mask.mean(dim=(-2, -1), keepdim=True).clamp_min(1e-6)).to(native.dtype)
        if native.ndim == 4:
            nhwc = getattr(self.timm_model, "output_fmt", "NCHW") == "NHWC"
            return native * scaled.unsqueeze(-1 if nhwc else 1)
        prefix = getattr(self.timm_model, "num_prefix_tokens", 0)
        return torch.cat([native[:, :prefix], native[:, prefix:] * scaled.flatten(1).unsqueeze(-1)], dim=1)

    def class_activation_maps(self, output: TimmCAMOutput, class_weights: torch.Tensor) -> torch.Tensor:
        """Raw CAMs of a batch for given classifier rows.

        Args:
            output (`TimmCAMOutput`): what `forward` returned for the batch.
            class_weights (`torch.Tensor` of shape `(b, d)` or `(m, b, d)`): the rows of each image's class; several
                sets may be given, for instance those of fast weights.

        Returns:
            `torch.Tensor` of shape `(b, h, w)` or `(m, b, h, w)`.
        """
        if self._pool_is_mean is None:
            self._pool_is_mean = self._averages(output.last_hidden_state)
        if self._pool_is_mean:
            return class_activation_maps(output.feature_maps, class_weights)
        if class_weights.ndim == 3:
            return torch.stack([self.class_activation_maps(output, rows) for rows in class_weights])
        evidence = head_gradient_activation(output.last_hidden_state, self.pool, class_weights)
        maps = self.to_feature_maps(evidence).sum(1)
        return maps * maps[0].numel()

    @torch.no_grad()
    def _averages(self, native: torch.Tensor) -> bool:
        """Whether the head pools by the plain mean of the cells, by trying it on a random map of the same shape."""
        sample = torch.randn(native[:1].shape, generator=torch.Generator().manual_seed(0)).to(
            native.device, self.dtype
        )
        with evaluation_mode(self), torch.autocast(native.device.type, enabled=False):
            pooled = self.pool(sample).float()
        mean = self.to_feature_maps(sample).float().mean(dim=(-2, -1))
        tolerance = 1e-6 if self.dtype == torch.float32 else 1e-2
        return pooled.shape == mean.shape and torch.allclose(pooled, mean, rtol=tolerance, atol=tolerance)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.LongTensor | None = None,
        cam_classes: torch.LongTensor | str | None = None,
        region_masks: torch.Tensor | None = None,
        step=None,
        **kwargs,
    ):
        r"""Classify a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(b, channels, height, width)`): normalized images.
            labels (`torch.LongTensor` of shape `(b,)`, *optional*): gives `loss`, the mean cross-entropy.
            cam_classes (`torch.LongTensor` of shape `(b,)` or `"predicted"`, *optional*): gives `cams`.
            region_masks (`torch.Tensor` of shape `(r, b, h, w)`, *optional*): gives `region_features` and
                `region_logits`: the same head on the map times each mask, rescaled by 1 / mean(mask). With average
                pooling that is masked average pooling.
            step (`Callable`, *optional*): what to run on this batch instead, `step(model, pixel_values)`; its result
                is returned as it is. Running the whole step inside `forward` is what lets distributed
                wrappers see, and synchronize, every gradient.

        Returns:
            [`TimmCAMOutput`]
        """
        if step is not None:
            return step(self, pixel_values)
        native = self.timm_model.forward_features(pixel_values.to(self.device, self.dtype))
        features = self.pool(native)
        logits = self.classify(features)
        output = TimmCAMOutput(
            loss=None if labels is None else F.cross_entropy(logits, labels),
            logits=logits,
            features=features,
            feature_maps=self.to_feature_maps(native),
            last_hidden_state=native,
        )
        return self.add_cams(output, cam_classes, region_masks)

    def add_cams(self, output: TimmCAMOutput, cam_classes=None, region_masks=None) -> TimmCAMOutput:
        """Add activation maps and regions to what `forward` returned; its arguments, but only the head runs."""
        if cam_classes is not None:
            assert output.logits is not None
            classes = output.logits.argmax(-1) if isinstance(cam_classes, str) else cam_classes
            output.cams = self.class_activation_maps(output, self.class_weights[classes])
        if region_masks is not None:
            native = output.last_hidden_state
            output.region_features = torch.stack([self.pool(self._masked(native, mask)) for mask in region_masks])
            output.region_logits = torch.stack([self.classify(features) for features in output.region_features])
        return output

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the last linear layer, by name."""
        head = {id(parameter) for layer in self.classifiers for parameter in layer.parameters()}
        return {name: parameter for name, parameter in self.named_parameters() if id(parameter) in head}


def _bias(layer: nn.Module) -> torch.Tensor:
    return layer.weight.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean(0)
