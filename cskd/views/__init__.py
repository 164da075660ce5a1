"""What is done to an image: parameters drawn from a seed (`recipe`), operations on uint8 pixels (`ops`), mixing, digests."""

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # pixels [H, W, 3], RGB, contiguous
