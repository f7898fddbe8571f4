"""Whether a run goes on with the images that it began with: their order and an epoch's position mean no others."""

from dcd.checkpoint_file import CheckpointError


def check_same_data(saved: dict[str, str] | None, ours: dict[str, str]) -> str | None:
    """For a run that goes on: a line to say, or None.

    Args:
        saved, ours: the fingerprints of the training images of the checkpoint and of this run, see
            `pipelines.fingerprint`: compared where both have something. saved: None in older checkpoints.

    Raises:
        CheckpointError: the images are others.
    """
    if saved is None:
        return "the checkpoint does not say on which images it was trained: that they are those of the data is assumed"
    differing = [what for what in saved if saved[what] != ours.get(what, saved[what])]
    if not differing:
        return None
    if "number" in differing:
        difference = f"{int(saved['number']):,} there, {int(ours['number']):,} here"
    else:
        difference = f"with other {' and '.join(differing)}"
    raise CheckpointError(
        f"the checkpoint is of other training images ({difference}): "
        "use the same data, or begin in another --checkpoint folder with its weights as --weight"
    )
