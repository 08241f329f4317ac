"""Digits: the 1797 handwritten digits of 8 by 8 pixels in 17 grey levels that come with scikit-learn.

They are the test part of "Optical recognition of handwritten digits" (Alpaydin, Kaynak 1998, UCI repository). No
division into training and test is published for them: ours is stratified and fixed, 1437 to train and 360 to test.
"""

import torch

from zeromean.lab.data.checksum import verify
from zeromean.lab.data.dataset import Dataset, assert_class_counts, split_validation

NAME = "digits"
TEST_COUNT = 360
COUNTS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
CHECKSUMS = {
    "digits-images": "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3",
    "digits-labels": "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0",
}
SOURCE = (
    "Alpaydin, Kaynak 1998: optical recognition of handwritten digits (UCI), as in scikit-learn; "
    "the split of 1437 to 360 is zeromean's own, stratified and fixed"
)


def load_digits() -> Dataset:
    """Return digits, from scikit-learn: nothing is downloaded.

    The sums are those of all pixels and of all labels as bytes, in scikit-learn's order, before the split.

    Raises:
        ValueError: If scikit-learn is absent or holds other data.
    """
    try:
        from sklearn.datasets import load_digits as embedded
    except ModuleNotFoundError as error:
        raise ValueError("the data set 'digits' comes with scikit-learn: pip install 'zeromean[lab]'") from error
    pixels, targets = embedded(return_X_y=True)
    images, labels = torch.from_numpy(pixels).to(torch.uint8), torch.from_numpy(targets).long()
    for name, values in (("digits-images", images), ("digits-labels", labels.to(torch.uint8))):
        remedy = "Reinstall scikit-learn."
        verify(values.numpy().tobytes(), CHECKSUMS[name], name=f"{name} of scikit-learn", remedy=remedy)
    assert_class_counts(labels, COUNTS)
    train, test = split_validation(labels, TEST_COUNT)
    images = images.view(-1, 1, 8, 8)
    return Dataset(
        name=NAME,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        pixel_max=16,
        classes=tuple("0123456789"),
        checksums=dict(CHECKSUMS),
        source=SOURCE,
    )
