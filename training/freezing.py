"""Training the classifier alone: the rest of the model stays as it is, the statistics of its batch norms included."""

from torch import nn


def freeze_all_but_classifier(model: nn.Module) -> None:
    """Leave gradients to `model.classifier` alone, which has its own batch norms where it is dynamic."""
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)


def train_what_is_not_frozen(model: nn.Module) -> None:
    """Training mode, but for each module whose parameters are all frozen: its batch norms keep their statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
