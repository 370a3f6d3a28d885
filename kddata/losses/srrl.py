"""Softmax regression representation learning: a student's features serve the teacher's own classifier."""

from __future__ import annotations

from torch import Tensor, nn

from kddata.losses.maps import pair, same_shape
from kddata.losses.weights import read_weights


def feature_mean_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images and channels of the squared difference of spatial means.

    Each side is a map [B, C, H, W] or its spatial mean [B, C], such as a pooled embedding; widths agree.
    """
    s, t = (x.flatten(2).mean(2) if x.ndim == 4 else x for x in pair(student, teacher))
    same_shape(s, t, "put the student's map through a Connector")
    return (s - t).square().mean()


def srrl_loss(
    student: Tensor,
    teacher: Tensor,
    student_logits_BC: Tensor,
    teacher_logits_BC: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 5.0,
) -> Tensor:
    """alpha * feature_mean_loss + beta * mean (z_s - z_t)^2 over images and classes.

    z_s are the student's features, connected to the teacher's width, through the teacher's classifier, which is frozen;
    z_t the teacher's own logits, not log-probabilities. Source: Yang et al., "Knowledge distillation via softmax
    regression representation learning" (ICLR 2021), equations 3 and 5.
    """
    z_s, z_t = pair(student_logits_BC, teacher_logits_BC)
    same_shape(z_s, z_t, "both are answers of the teacher's classifier")
    return alpha * feature_mean_loss(student, teacher) + beta * (z_s - z_t).square().mean()


class Connector(nn.Sequential):
    """relu(batchnorm(1 x 1 convolution without bias)): a student's channels to its teacher's."""

    def __init__(self, student_channels: int, teacher_channels: int, *, relu: bool = True) -> None:
        conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        nn.init.normal_(conv.weight, 0.0, (2.0 / teacher_channels) ** 0.5)
        super().__init__(conv, nn.BatchNorm2d(teacher_channels), *([nn.ReLU()] if relu else []))


class TeacherClassifier(nn.Module):
    """The linear layer at a teacher's end, frozen: weight [C, D] and bias [C]. `load` reads it from safetensors."""

    weight_CD: Tensor
    bias_C: Tensor

    def __init__(self, weight_CD: Tensor, bias_C: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight_CD", weight_CD.float())
        self.register_buffer("bias_C", bias_C.float())

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD @ self.weight_CD.T + self.bias_C

    @classmethod
    def load(cls, url: str, layer: str) -> TeacherClassifier:
        """That of a teacher's weights. Raises ConfigError where the file, or the layer in it, is not there."""
        names = [f"{layer}.weight", f"{layer}.bias"]
        fix = "set method.classifier_layer to the teacher's last layer"
        return cls(*read_weights(url, "classifier", names, ndim=2, kind="linear", fix=fix))
