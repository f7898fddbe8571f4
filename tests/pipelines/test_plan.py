"""The plan is pure, covers what it must, and draws what torchvision draws."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from pipelines.plan import CenterCrop, EpochPlan, RandomCrop
from tests.pipelines.helpers import Inverted, evaluation_plan, training_plan

SIZES = np.random.default_rng(0).integers(50, 600, (103, 2))
ALIKE = np.broadcast_to(np.array([375, 500]), (4000, 2))  # ImageNet's typical size


def content(plan, rank=0, world_size=1):
    """Everything that a rank does in an epoch: one row (index, top, left, height, width, flip) for each image."""
    steps = [plan.step(step, rank, world_size) for step in range(len(plan))]
    return np.concatenate([np.column_stack([step.indices, step.boxes, step.flips]) for step in steps])


def assert_inside(boxes, sizes):
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (height >= 1).all() and (width >= 1).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()


def test_the_random_rule_is_pinned():
    # A change of these figures breaks every run that resumes: its images would be drawn anew.
    plan = training_plan(0, 0, ALIKE[:1000], 4)
    assert content(plan)[:5].tolist() == [
        [908, 64, 9, 275, 245, 1],
        [993, 16, 83, 353, 376, 1],
        [399, 0, 21, 369, 415, 1],
        [242, 8, 23, 362, 380, 0],
        [468, 48, 179, 263, 199, 1],
    ]


@pytest.mark.parametrize("plan", [training_plan, evaluation_plan])
def test_the_same_arguments_give_the_same_plan_in_any_order_of_steps(plan):
    first, second = plan(3, 5, SIZES, 8), plan(3, 5, SIZES.copy(), 8)
    backwards = [second.step(step) for step in reversed(range(len(second)))][::-1]
    assert len(first) == len(second)
    for step, other in enumerate(backwards):
        one = first.step(step)
        assert one.indices.dtype == np.int64 and one.boxes.dtype == np.int32 and one.flips.dtype == np.bool_
        for name in ("indices", "boxes", "flips"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("seed, epoch", [(4, 5), (3, 6), (5, 3)])
def test_another_seed_or_epoch_gives_another_order_other_boxes_and_other_flips(seed, epoch):
    def by_index(seed, epoch):
        rows = content(training_plan(seed, epoch, ALIKE, 8))
        return rows, rows[rows[:, 0].argsort()]

    (rows, by_image), (other_rows, other_by_image) = by_index(3, 5), by_index(seed, epoch)
    assert (rows[:, 0] == other_rows[:, 0]).mean() < 0.01
    assert (by_image[:, 1:5] == other_by_image[:, 1:5]).all(1).mean() < 0.01
    assert 0.45 < (by_image[:, 5] == other_by_image[:, 5]).mean() < 0.55


def test_training_shuffles_every_image_once_and_drops_the_incomplete_batch():
    plan = training_plan(0, 0, SIZES, 8)
    assert sorted(plan.order) == list(range(103))
    indices = content(plan)[:, 0]
    assert len(plan) == 12 and len(indices) == len(set(indices)) == 96
    assert not np.array_equal(indices, np.sort(indices))


@pytest.mark.parametrize("crop", [RandomCrop(), CenterCrop()])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_order_and_last_batch_do_not_depend_on_the_crop(crop, shuffle, drop_last):
    plan = EpochPlan(0, 0, SIZES, 8, crop, shuffle=shuffle, drop_last=drop_last)
    expected = training_plan(0, 0, SIZES, 8).order if shuffle else np.arange(103)
    np.testing.assert_array_equal(content(plan)[:, 0], expected[: 96 if drop_last else 103])


def test_the_dropped_images_differ_from_epoch_to_epoch():
    dropped = {tuple(training_plan(0, epoch, SIZES, 8).order[96:]) for epoch in range(10)}
    assert len(dropped) == 10


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_copies_of_an_image_lie_in_one_batch_and_are_drawn_apart(world_size):
    options = {"shuffle": True, "drop_last": True, "augmentations": [Inverted()]}
    plan, plain = (EpochPlan(7, 2, ALIKE, 12, RandomCrop(), **options, repeats=repeats) for repeats in (3, 1))
    assert len(plan) == len(plain) == 333
    same_flips, same_operations = [], []
    for number in range(333):
        parts = [plan.step(number, rank, world_size) for rank in range(world_size)]
        indices = np.concatenate([part.indices for part in parts]).reshape(3, 4)
        boxes = np.concatenate([part.boxes for part in parts]).reshape(3, 4, 4)
        flips, operations = (
            np.concatenate(found).reshape(3, 4)
            for found in ([part.flips for part in parts], [part.operations[0] for part in parts])
        )
        np.testing.assert_array_equal(indices, np.tile(plain.order[4 * number : 4 * number + 4], (3, 1)))
        # the first copies are those of a plan without repeats
        expected_boxes, expected_flips = RandomCrop().draw(7, 2, indices[0], ALIKE[indices[0]])
        np.testing.assert_array_equal(boxes[0], expected_boxes)
        np.testing.assert_array_equal(flips[0], expected_flips)
        np.testing.assert_array_equal(operations[0], Inverted().draw(7, 2, indices[0]))
        assert all((boxes[a] != boxes[b]).any(1).all() for a, b in ((0, 1), (0, 2), (1, 2)))
        same_flips.append(flips[1] == flips[0])
        same_operations.append(operations[2] == operations[1])
    assert 0.45 < np.mean(same_flips) < 0.55 and 0.45 < np.mean(same_operations) < 0.55


@pytest.mark.parametrize("repeats", [0, 5, 24])
def test_copies_that_do_not_divide_a_batch_are_refused(repeats):
    with pytest.raises(ValueError, match=f"{repeats} copies of each image do not divide a batch of 12"):
        EpochPlan(0, 0, SIZES, 12, RandomCrop(), shuffle=True, drop_last=True, repeats=repeats)


def test_every_image_gets_to_every_place():
    # Over 200 epochs the mean place of an image is normally distributed about the middle, 51 ± 2.1.
    places = np.stack([training_plan(0, epoch, SIZES, 8).order.argsort() for epoch in range(200)])
    assert abs(places.mean(0) - 51).max() < 4.5 * 103 / math.sqrt(12 * 200)


def test_boxes_and_flips_do_not_depend_on_batch_size_rank_or_world_size():
    def by_image(batch_size, world_size):
        plan = training_plan(7, 2, SIZES, batch_size)
        rows = np.concatenate([content(plan, rank, world_size) for rank in range(world_size)])
        return {row[0]: tuple(row[1:]) for row in rows.tolist()}

    whole = by_image(1, 1)
    assert len(whole) == 103
    for batch_size, world_size in ((103, 1), (6, 2), (12, 3)):
        part = by_image(batch_size, world_size)
        assert part.items() <= whole.items()


@pytest.mark.parametrize("make_plan", [training_plan, evaluation_plan])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_slices_put_together_are_the_global_batch(world_size, make_plan):
    plan = make_plan(1, 1, SIZES, 12)
    for step in range(len(plan)):
        whole, parts = plan.step(step), [plan.step(step, rank, world_size) for rank in range(world_size)]
        for name in ("indices", "boxes", "flips"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert np.ptp([len(part.indices) for part in parts]) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [17, 18, 13, 5, 1])  # a last batch of 5, 6, 1 image(s); less than one batch
def test_evaluation_sees_each_image_exactly_once(num_images, world_size):
    plan = evaluation_plan(0, 0, SIZES[:num_images], 6)
    rows = np.concatenate([content(plan, rank, world_size) for rank in range(world_size)])
    assert sorted(rows[:, 0]) == list(range(num_images))
    assert not rows[:, 5].any()
    if world_size == 1:
        assert rows[:, 0].tolist() == list(range(num_images))  # in the dataset's order


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (5000, 3), (3, 5000), (2, 2), (4000, 6000)])
@pytest.mark.parametrize("crop", [RandomCrop(), RandomCrop(area=(1e-6, 1e-6)), RandomCrop(area=(1, 1)), CenterCrop()])
def test_boxes_lie_inside_images_of_extreme_sizes(size, crop):
    sizes = np.broadcast_to(np.array(size), (200, 2))
    boxes, _ = crop.draw(0, 0, np.arange(200), sizes)
    assert_inside(boxes, sizes)


def test_boxes_keep_the_bounds_of_area_and_ratio_up_to_rounding():
    crop = RandomCrop(area=(0.2, 0.6), ratio=(0.5, 1.5))
    boxes, _ = crop.draw(0, 0, np.arange(4000), ALIKE)
    assert_inside(boxes, ALIKE)
    height, width = boxes[:, 2].astype(float), boxes[:, 3].astype(float)
    # rounding moves each side by at most half a pixel
    area = 375 * 500
    assert ((height + 0.5) * (width + 0.5) >= 0.2 * area).all() and ((height - 0.5) * (width - 0.5) <= 0.6 * area).all()
    assert ((width + 0.5) / (height - 0.5) >= 0.5).all() and ((width - 0.5) / (height + 0.5) <= 1.5).all()


@pytest.mark.parametrize("size", [(375, 500), (500, 200), (100, 1000)])  # in the last one most draws fall back
def test_boxes_are_distributed_as_torchvisions(size):
    def figures(boxes):
        """For each box: share of the area, log ratio, and where it begins as a share of the sides."""
        top, left, height, width = np.asarray(boxes, float).T
        return np.stack([height * width / np.prod(size), np.log(width / height), top / size[0], left / size[1]])

    count = 4000
    ours, _ = RandomCrop().draw(0, 0, np.arange(count), np.broadcast_to(np.array(size), (count, 2)))
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ours, theirs = figures(ours), figures(theirs)
    for one, other in zip(ours, theirs, strict=True):
        error = math.sqrt((one.var() + other.var()) / count)
        assert abs(one.mean() - other.mean()) < 4 * error + 1e-9  # four standard errors
        assert one.std() == pytest.approx(other.std(), rel=0.12, abs=1e-9)


def test_an_image_too_long_for_any_box_gets_torchvisions_fallback():
    size = (5000, 3)
    boxes, _ = RandomCrop(area=(0.5, 1)).draw(0, 0, np.arange(5), np.broadcast_to(np.array(size), (5, 2)))
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), [0.5, 1.0], [3 / 4, 4 / 3])
    assert boxes.tolist() == [list(expected)] * 5 == [[2498, 0, 4, 3]] * 5


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_come_with_their_probability_and_apart_from_the_boxes(probability):
    boxes, flips = RandomCrop(flip=probability).draw(0, 0, np.arange(4000), ALIKE)
    assert flips.mean() == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / 4000))
    if 0 < probability < 1:
        for column in boxes.T:
            assert abs(np.corrcoef(column, flips)[0, 1]) < 4 / math.sqrt(4000)


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (256, 256), (427, 640), (300, 300), (1200, 333), (64, 64)])
def test_center_crop_cuts_what_resize_256_and_crop_224_cut(size):
    (top, left, height, width), flip = (x[0] for x in CenterCrop().draw(0, 0, np.array([0]), np.array([size])))
    scale = min(size) / 256  # source pixels for each pixel of the resized image
    assert height == width and abs(height - 224 * scale) <= 0.5 and not flip
    for start, side in ((top, size[0]), (left, size[1])):
        assert abs(start - (side - 224 * scale) / 2) <= 1  # half a pixel each by the rounding of the side and the start


def test_center_crop_of_share_one_is_the_largest_square():
    boxes, _ = CenterCrop(1.0).draw(0, 0, np.arange(3), np.array([[10, 20], [20, 10], [1, 1]]))
    assert boxes.tolist() == [[0, 5, 10, 10], [5, 0, 10, 10], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    "arguments",
    [
        {"area": (0, 1)},
        {"area": (0.5, 0.2)},
        {"area": (0.5, 1.1)},
        {"area": (float("nan"), 1)},
        {"ratio": (0, 1)},
        {"ratio": (2, 1)},
        {"flip": -0.1},
        {"flip": 1.1},
    ],
)
def test_a_random_crop_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="must"):
        RandomCrop(**arguments)


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_a_center_crop_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        CenterCrop(share)


@pytest.mark.parametrize("seed, epoch, batch_size", [(-1, 0, 8), (0, -1, 8), (0, 0, 0), (0, 0, -8), (2**64, 0, 8)])
@pytest.mark.parametrize("plan", [training_plan, evaluation_plan])
def test_a_plan_out_of_range_is_refused(seed, epoch, batch_size, plan):
    with pytest.raises(ValueError, match="seed|epoch|batch"):
        plan(seed, epoch, SIZES, batch_size)


def test_steps_and_ranks_out_of_range_are_refused():
    plan = training_plan(0, 0, SIZES, 8)
    for step in (-1, 12):
        with pytest.raises(IndexError, match="12 steps"):
            plan.step(step)
    for rank, world_size in ((2, 2), (-1, 2), (0, 0)):  # they would take images that belong to another rank or step
        with pytest.raises(ValueError, match="rank"):
            plan.step(0, rank, world_size)


def test_planning_prints_and_warns_nothing(capfd, recwarn):
    # Integer overflow is the generator's way of working; NumPy warns about it for scalars.
    content(training_plan(2**62, 10**6, SIZES, 8))
    content(training_plan(0, 0, np.array([[1, 1000], [5000, 3]]), 1))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
