"""The training transforms against slow references that treat one image at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from acs_fast import augment


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=6, channels=3, size=8, seed=0):
    return torch.rand(batch, channels, size, size, generator=seeded(seed))


def crop_boxes(batch, size, mirror, generator):
    """Left, top, width, height and flip of each image: torchvision's RandomResizedCrop, in Python floats."""
    draws = torch.rand(2, batch, 10, generator=generator).tolist()
    boxes = []
    for areas, ratios in zip(*draws, strict=True):
        box = (size, size)
        for u, v in zip(areas, ratios, strict=True):
            area, ratio = (0.5 + 0.5 * u) * size**2, math.exp((2 * v - 1) * math.log(4 / 3))
            width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if width <= size and height <= size:
                box = (width, height)
                break
        boxes.append(box)
    x, y = torch.rand(2, batch, generator=generator).tolist()
    flips = (torch.rand(batch, generator=generator) < 0.5).tolist() if mirror else [False] * batch
    return [
        (math.floor(x[i] * (size - w + 1)), math.floor(y[i] * (size - h + 1)), w, h, flips[i])
        for i, (w, h) in enumerate(boxes)
    ]


def crop_one(image, left, top, width, height, flip):
    """Slice, resize bilinearly, flip: what torchvision does with one image."""
    size = image.shape[-1]
    part = image[None, :, top : top + height, left : left + width]
    resized = F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)[0]
    return resized.flip(-1) if flip else resized


def inside(width, height, size):
    """Where the output's bilinear taps all lie inside the box: not in the outermost rows and columns."""
    masks = []
    for edge in (height, width):
        centre = (torch.arange(size) + 0.5) * edge / size - 0.5
        masks.append((centre >= 0) & (centre <= edge - 1))
    return masks[0][:, None] & masks[1]


class ScriptedRand:
    """Stands in for torch.rand and answers the given draws, one a call, filled to the shape asked for."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def __call__(self, *shape, generator):
        return torch.as_tensor(self.draws.pop(0), dtype=torch.float32).expand(shape).clone()


@pytest.mark.parametrize("flip", [False, True], ids=["kept", "flipped"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
@pytest.mark.parametrize("size", [8, 17], ids=["8px", "17px"])
def test_a_whole_box_reproduces_the_image(monkeypatch, size, channels, flip):
    x = images(4, channels, size)
    whole = torch.tensor([1.0, 0.5]).view(2, 1, 1)  # area 1, aspect ratio 1
    monkeypatch.setattr(augment.torch, "rand", ScriptedRand(whole, 0.3, 0.0 if flip else 0.9))
    got = augment.random_resized_crop(x, True, seeded())
    torch.testing.assert_close(got, x.flip(-1) if flip else x, rtol=1e-5, atol=1e-5)


def test_without_a_valid_box_the_image_is_kept_whole(monkeypatch):
    x = images()
    too_wide = torch.tensor([1.0, 1.0]).view(2, 1, 1)  # area 1, aspect ratio 4/3
    monkeypatch.setattr(augment.torch, "rand", ScriptedRand(too_wide, 0.9))
    torch.testing.assert_close(augment.random_resized_crop(x, False, seeded()), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mirror", [False, True], ids=["unmirrored", "mirrored"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 17), (3, 32)], ids=["1x8", "3x17", "3x32"])
def test_crop_is_slice_resize_and_flip_of_each_image(channels, size, mirror):
    x = images(20, channels, size)
    boxes = crop_boxes(20, size, mirror, seeded(1))
    assert len(set(boxes)) > 10 and {box[4] for box in boxes} == {False, mirror}
    got = augment.random_resized_crop(x, mirror, seeded(1))
    for image, box, result in zip(x, boxes, got, strict=True):
        mask = inside(*box[2:4], size)
        mask = mask.flip(-1) if box[4] else mask
        assert mask.float().mean() > 0.5
        torch.testing.assert_close(result[:, mask], crop_one(image, *box)[:, mask], rtol=1e-4, atol=1e-4)


def test_crop_edges_take_nothing_from_outside_the_box():
    x = images(20, 3, 17)
    boxes = crop_boxes(20, 17, False, seeded(1))
    got = augment.random_resized_crop(x, False, seeded(1))
    expected = torch.stack([crop_one(image, *box) for image, box in zip(x, boxes, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_boxes_stay_inside_and_cover_the_stated_areas_and_ratios():
    # ramps along x and y: the centre pixel shows the box's centre, the slope its edge
    size, batch = 33, 500
    ramp = torch.arange(size, dtype=torch.float32).expand(size, size)
    x = torch.stack((ramp, ramp.T)).expand(batch, 2, size, size)
    got = augment.random_resized_crop(x, False, seeded(2))
    middle = size // 2
    width = (got[:, 0, middle, middle + 1] - got[:, 0, middle, middle]) * size
    height = (got[:, 1, middle + 1, middle] - got[:, 1, middle, middle]) * size
    left, top = got[:, 0, middle, middle] - (width - 1) / 2, got[:, 1, middle, middle] - (height - 1) / 2
    for edge, start in ((width, left), (height, top)):
        assert (start > -0.01).all() and (start + edge < size + 0.01).all()
        torch.testing.assert_close(edge, edge.round(), rtol=0, atol=0.01)
    area, ratio = width * height / size**2, width / height
    assert 0.47 < area.min() < 0.53 and area.max() > 0.95
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.43


def test_mirror_flips_about_half_of_the_images():
    x = torch.arange(9.0).expand(400, 1, 9, 9)
    flipped = augment.random_resized_crop(x, True, seeded())[:, 0, 4].diff().mean(dim=1) < 0
    assert 160 < flipped.sum() < 240


def color_jitter_one(image, factors, order):
    """One image pixel by pixel: brightness, contrast, saturation by `factors`, in `order`."""
    _, height, width = image.shape
    x = image.double()
    for operation in order:
        f = factors[operation]
        grey = [
            [float(0.299 * x[0, r, c] + 0.587 * x[1, r, c] + 0.114 * x[2, r, c]) for c in range(width)]
            for r in range(height)
        ]
        mean = sum(sum(row) for row in grey) / (height * width)
        other = (torch.zeros(height, width), torch.full((height, width), mean), torch.tensor(grey))[operation]
        x = torch.stack([f * channel + (1 - f) * other for channel in x])
    return x


def colors(factors=(1.0, 1.0, 1.0), order=(0, 1, 2), alpha=(0.0, 0.0, 0.0)):
    return torch.tensor([[*factors, *order, *alpha]])


def recolored(x, drawn):
    """`recolor` before its normalisation."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return augment.recolor(x, drawn) * std + mean


def test_color_jitter_blends_each_image_in_its_own_order():
    x, drawn = images(12, size=4), augment.draw_colors(12, seeded(3))
    drawn[:, 6:] = 0.0
    orders = drawn[:, 3:6].int().tolist()
    assert len({tuple(order) for order in orders}) > 3
    expected = [color_jitter_one(*row) for row in zip(x, drawn[:, :3].tolist(), orders, strict=True)]
    torch.testing.assert_close(recolored(x, drawn).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_factors_of_one_change_nothing():
    x = images()
    torch.testing.assert_close(recolored(x, colors().expand(len(x), 9)), x)


def test_colors_are_drawn_as_stated():
    drawn = augment.draw_colors(3000, seeded())
    factors, order, alpha = drawn[:, :3], drawn[:, 3:6], drawn[:, 6:]
    assert 0.6 <= factors.min() < 0.605 and 1.395 < factors.max() <= 1.4
    assert factors.mean(dim=0).sub(1).abs().max() < 0.015
    counts = torch.unique(order, dim=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 400  # every order is as likely
    assert alpha.std(dim=0).tolist() == pytest.approx([0.1] * 3, rel=0.05)


def test_lighting_adds_the_pca_shift():
    x = images(5)
    drawn = colors().repeat(5, 1)
    alpha = drawn[:, 6:] = 0.1 * torch.randn(5, 3, generator=seeded(4))
    got = recolored(x, drawn)
    vectors = [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    values = [0.2175, 0.0188, 0.0045]
    for i in range(5):
        for channel in range(3):
            shift = sum(vectors[channel][k] * float(alpha[i, k]) * values[k] for k in range(3))
            torch.testing.assert_close(got[i, channel], x[i, channel] + shift, rtol=1e-5, atol=1e-6)


def test_normalize():
    x = images()
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(augment.normalize(x)[:, channel], (x[:, channel] - mean) / std)
    torch.testing.assert_close(augment.normalize(x[:, :1]), 2 * x[:, :1] - 1)


@pytest.mark.parametrize("size", [8, 15], ids=["8px", "15px"])
@pytest.mark.parametrize("seed", range(12))
def test_cutmix_pastes_one_box_and_states_its_area(size, seed):
    labels = torch.arange(7)
    position = torch.arange(2 * size * size, dtype=torch.float32).view(1, 2, size, size)
    x = position + 1000.0 * labels.view(-1, 1, 1, 1)  # every value names its image and its place
    box, order = augment.draw_cutmix(7, size, seeded(seed))
    mixed, kept = augment.cutmix(x, box, order)
    assert sorted(order.tolist()) == labels.tolist()
    source = (mixed / 1000).floor().long()
    assert torch.equal(mixed - 1000.0 * source, position.expand_as(mixed))  # pixels keep their place
    top, bottom, left, right = box.tolist()
    expected = labels.view(-1, 1, 1, 1).expand_as(source).clone()
    expected[:, :, top:bottom, left:right] = order.view(-1, 1, 1, 1)
    assert torch.equal(source, expected)
    assert kept.item() == pytest.approx(1 - (bottom - top) * (right - left) / size**2, abs=1e-6)
    assert torch.equal(x, position + 1000.0 * labels.view(-1, 1, 1, 1))  # the input is left alone


def test_cutmix_area_is_uniform_up_to_the_border():
    x, generator = images(2, 1, 64), seeded()
    kept = torch.tensor([augment.cutmix(x, *augment.draw_cutmix(2, 64, generator))[1] for _ in range(2000)])
    assert kept.min() >= 0 and kept.max() <= 1
    # the box is clipped at the border, so the kept area is at least the drawn one: E = 1 - E[clipped area]
    drawn = torch.rand(2000, generator=seeded(1))
    edge = (64 * (1 - drawn).sqrt()).floor() // 2 * 2
    center = torch.randint(0, 64, (2, 2000), generator=seeded(2))
    sides = [(c + edge / 2).clamp_max(64) - (c - edge / 2).clamp_min(0) for c in center]
    expected = 1 - sides[0] * sides[1] / 64**2
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert kept.quantile(q).item() == pytest.approx(expected.quantile(q).item(), abs=0.04)


def shuffled_one(image, swaps):
    """RDED's 2x2 patches of one image: the columns in a new order, then the rows."""
    half = image.shape[-1] // 2
    columns = [image[:, :, :half], image[:, :, half:]]
    image = torch.cat(columns[::-1] if swaps[0] else columns, dim=2)
    rows = [image[:, :half], image[:, half:]]
    return torch.cat(rows[::-1] if swaps[1] else rows, dim=1)


@pytest.mark.parametrize("size", [8, 7], ids=["8px", "7px"])
def test_patches_are_swapped_column_by_column_and_row_by_row(size):
    x, swaps = images(12, 3, size), augment.draw_patches(12, seeded(1))
    assert len({tuple(row) for row in swaps.tolist()}) == 4
    expected = torch.stack([shuffled_one(*row) for row in zip(x, swaps.tolist(), strict=True)])
    assert torch.equal(augment.shuffle_patches(x, swaps), expected)


TRANSFORMS = {
    "crop": lambda x, g: augment.random_resized_crop(x, True, g),
    "recolor": lambda x, g: augment.recolor(x, augment.draw_colors(len(x), g)),
    "cutmix": lambda x, g: augment.cutmix(x, *augment.draw_cutmix(len(x), x.shape[-1], g))[0],
    "patches": lambda x, g: augment.shuffle_patches(x, augment.draw_patches(len(x), g)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_functions_of_the_generator(name):
    transform, x = TRANSFORMS[name], images()
    kept = x.clone()
    torch.manual_seed(1)
    first = transform(x, seeded(5))
    torch.manual_seed(2)
    assert torch.equal(transform(x, seeded(5)), first)
    assert not torch.equal(transform(x, seeded(6)), first)
    assert torch.equal(x, kept)
