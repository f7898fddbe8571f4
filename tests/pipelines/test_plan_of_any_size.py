"""The plan for any dataset, world, batch and image: what hypothesis finds, but the same in every run."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.plan import CenterCrop, EpochPlan, RandomCrop

SIDES = st.integers(1, 65535) | st.sampled_from([1, 2, 3, 65534, 65535])
LISTS = st.lists(st.tuples(SIDES, SIDES), max_size=40).map(lambda sizes: np.array(sizes, np.int32).reshape(-1, 2))
SIZES = st.tuples(LISTS, st.integers(1, 5)).map(lambda drawn: np.tile(drawn[0], (drawn[1], 1)))
KEYS = st.integers(0, 2**63 - 1) | st.sampled_from([0, 2**32, 2**53 + 1, 2**63 - 1])
BOOLEANS = st.booleans()
SHARES = st.floats(1e-9, 1)
RATIOS = st.floats(1e-5, 1e5)


def ordered(values):
    return st.tuples(values, values).map(lambda pair: tuple(sorted(pair)))


RANDOM_CROPS = st.just(RandomCrop()) | st.builds(
    RandomCrop, area=ordered(SHARES), ratio=ordered(RATIOS), flip=st.floats(0, 1)
)
CROPS = RANDOM_CROPS | st.just(CenterCrop()) | st.builds(CenterCrop, share=SHARES)


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(SIZES, st.integers(1, 20) | st.integers(1, 250), st.integers(1, 20), KEYS, KEYS, CROPS, BOOLEANS, BOOLEANS)
def test_every_image_once_every_box_inside_every_rank_its_part(
    sizes, batch_size, world_size, seed, epoch, crop, shuffle, drop_last
):
    plan = EpochPlan(seed, epoch, sizes, batch_size, crop, shuffle=shuffle, drop_last=drop_last)
    seen = []
    for number in range(len(plan)):
        whole = plan.step(number)
        parts = [plan.step(number, rank, world_size) for rank in range(world_size)]
        for name in ("indices", "boxes", "flips"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        assert np.ptp([len(part.indices) for part in parts]) <= 1
        assert whole.indices.dtype == np.int64 and whole.boxes.dtype == np.int32 and whole.flips.dtype == np.bool_
        assert whole.boxes.shape == (len(whole.indices), 4) and whole.flips.shape == whole.indices.shape
        corner, box, image = whole.boxes[:, :2], whole.boxes[:, 2:], sizes[whole.indices]
        assert (corner >= 0).all() and (box >= 1).all() and (corner + box <= image).all()
        seen.extend(whole.indices.tolist())
    kept = len(sizes) // batch_size * batch_size if drop_last else len(sizes)
    assert len(seen) == len(set(seen)) == kept and set(seen) <= set(range(len(sizes)))
    assert sorted(plan.order) == list(range(len(sizes)))


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(SIZES.filter(len), KEYS, KEYS, CROPS, st.data())
def test_a_box_and_a_flip_depend_on_seed_epoch_and_image_alone(sizes, seed, epoch, crop, data):
    whole_boxes, whole_flips = crop.draw(seed, epoch, np.arange(len(sizes)), sizes)
    index = data.draw(st.integers(0, len(sizes) - 1))
    boxes, flips = crop.draw(seed, epoch, np.array([index]), sizes[[index]])
    np.testing.assert_array_equal(boxes[0], whole_boxes[index])
    assert flips[0] == whole_flips[index]
